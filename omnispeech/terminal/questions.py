"""What the person says: the live sound goes to the server, its turns are shown."""

import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field

from omnispeech.audio.io import SAMPLE_RATE_HZ
from omnispeech.terminal.link import Event, Link
from omnispeech.terminal.player import loudness
from omnispeech.terminal.record import Record, Said
from omnispeech.terminal.screen import Screen
from omnispeech.terminal.sent import Sent
from omnispeech.terminal.timing import Timing, end_of_speech_s

SHORTEST_MS = 100  # the server takes no shorter turn
YOU = "you"


@dataclass(slots=True)
class Questions:
    """on_speech: somebody begins to speak. on_asked: the server has a whole question."""

    link: Link
    screen: Screen
    record: Record
    on_speech: Callable[[], None]
    on_asked: Callable[[Timing], None]
    transcribed: bool = False  # the server writes down what it hears
    turns: int = 0
    level: float = 0.0
    unwritten: set[str] = field(default_factory=set)  # items whose transcript is to come
    _sent: Sent = field(default_factory=Sent)
    _from_ms: int | None = None  # of the turn that is being said
    _to_ms: int | None = None
    _released_s: float | None = None
    _said: dict[str, Said] = field(default_factory=dict)

    def handlers(self) -> dict[str, Callable[[Event], None]]:
        spoken = "conversation.item.input_audio_transcription"
        return {
            "input_audio_buffer.speech_started": self._started,
            "input_audio_buffer.speech_stopped": self._stopped,
            "input_audio_buffer.committed": self._committed,
            f"{spoken}.completed": self._written,
            f"{spoken}.failed": self._not_written,
        }

    @property
    def open(self) -> bool:
        return self._from_ms is not None and self._to_ms is None

    def begin(self, clock_ms: int) -> None:
        """A session begins, or goes on: the sound of before is gone."""
        self._sent = Sent(clock_ms)
        for item in [*self.unwritten]:
            self._show_length(item)
        self.forget()

    def forget(self) -> None:
        self._from_ms = self._to_ms = self._released_s = None

    def hear(self, pcm: bytes) -> None:
        """16-bit mono at 16 kHz"""
        self.level = loudness(pcm)
        self._sent.push(pcm, time.monotonic())
        self.link.send("input_audio_buffer.append", audio=b64encode(pcm).decode())

    def press(self) -> None:
        """The person begins to speak, without a detector of speech."""
        self.forget()
        self._from_ms = self._sent.now_ms

    def release(self) -> bool:
        """The question is whole; False if it is too short to be one."""
        if self._from_ms is None:
            return False
        self._to_ms, self._released_s = self._sent.now_ms, time.monotonic()
        self.level = 0.0
        if self._to_ms - self._from_ms < SHORTEST_MS:
            self.link.send("input_audio_buffer.clear")
            self.forget()
            return False
        self.link.send("input_audio_buffer.commit")
        self.link.send("response.create")
        return True

    def _started(self, event: Event) -> None:
        self._from_ms, self._to_ms = event["audio_start_ms"], None
        self.on_speech()

    def _stopped(self, event: Event) -> None:
        self._to_ms = event["audio_end_ms"]

    def _committed(self, event: Event) -> None:
        from_ms = self._from_ms or 0
        to_ms = self._sent.now_ms if self._to_ms is None else self._to_ms
        said = Said(YOU, SAMPLE_RATE_HZ, pcm=bytearray(self._sent.cut(from_ms, to_ms)))
        self._said[event["item_id"]] = self.record.add(said)
        self.record.write(said)
        self.unwritten.add(event["item_id"])
        if not self.transcribed:
            self._show_length(event["item_id"])
        end_ms = from_ms + 1000 * end_of_speech_s(bytes(said.pcm), SAMPLE_RATE_HZ)
        spoken_till_s = self._released_s or self._sent.moment_s(end_ms)
        self.forget()
        self.turns += 1
        self.on_asked(Timing(time.monotonic(), spoken_till_s))

    def _written(self, event: Event) -> None:
        if event["item_id"] not in self.unwritten:
            return
        said = self._said[event["item_id"]]
        said.text = event["transcript"].strip()
        if not said.text:
            self._show_length(event["item_id"])
            return
        self.unwritten.discard(event["item_id"])
        self.record.write(said)
        self.screen.line(f"{YOU}: {said.text}", YOU)

    def _not_written(self, event: Event) -> None:
        if event["item_id"] in self.unwritten:
            self._show_length(event["item_id"])

    def _show_length(self, item: str) -> None:
        """In place of its transcript."""
        self.unwritten.discard(item)
        self.screen.line(f"{YOU}: [{self._said[item].seconds:.1f} s of sound]", YOU)
