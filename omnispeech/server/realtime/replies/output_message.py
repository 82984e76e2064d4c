"""One message of a reply, as it is told while it is made."""

import asyncio
from base64 import b64encode
from collections.abc import Callable
from typing import Any

from omnispeech.engine.events import AudioDelta, TextDelta
from omnispeech.server.realtime.items.kinds import AssistantMessage
from omnispeech.server.realtime.items.spoken_text import SpokenText
from omnispeech.server.realtime.outbox import Outbox
from omnispeech.server.realtime.replies.output_audio import OutputAudio
from omnispeech.server.realtime.settings.session_settings import ResponseSettings


class OutputMessage:
    """Its deltas, and what of them the client has got.

    place: the fields by which the events of this response name the item. of: in whose name they
    are put into the outbox.
    """

    def __init__(
        self,
        item: AssistantMessage,
        place: dict[str, Any],
        of: object,
        outbox: Outbox,
        settings: ResponseSettings,
        from_hz: int,
    ) -> None:
        self.item = item
        self.sent_ms = 0.0
        self.played_s = 0.0  # when all that was sent has been played, on the event loop's clock
        self._given_ms = 0.0
        self._place = place | {"item_id": item.id, "content_index": 0}
        self._of = of
        self._outbox = outbox
        self._spoken = settings.speech
        self._format = settings.output_format
        self._audio = OutputAudio(from_hz, settings.output_format)
        self._sent_text = ""
        self._unsent = 0  # deltas

    @property
    def all_sent(self) -> bool:
        return self._unsent == 0

    def open(self) -> None:
        part = self._part("")
        self._outbox.put({"type": "response.content_part.added", **self._place, "part": part})

    def write(self, delta: TextDelta) -> None:
        self.item.spoken.add_text(delta.text, delta.from_s)

        def sent() -> None:
            self._unsent -= 1
            self._sent_text += delta.text

        kind = "output_audio_transcript" if self._spoken else "output_text"
        self._unsent += 1
        self._tell(f"response.{kind}.delta", sent, delta=delta.text)

    def speak(self, delta: AudioDelta) -> None:
        for piece in self._audio.push(delta.pcm):
            self._send(piece)

    def finish(self) -> None:
        """The model has ended it."""
        if self._spoken:
            for piece in self._audio.finish():
                self._send(piece)
        self.item.spoken.finish()

    def _send(self, piece: bytes) -> None:
        ms = self._format.milliseconds(len(piece))
        self.item.spoken.add_audio(ms)
        self._given_ms += ms

        def sent() -> None:
            self._unsent -= 1
            self.sent_ms += ms
            now_s = asyncio.get_running_loop().time()
            self.played_s = max(self.played_s, now_s) + ms / 1000

        self._unsent += 1
        self._tell("response.output_audio.delta", sent, delta=b64encode(piece).decode())

    def forget_unsent(self) -> None:
        """The deltas that were not sent have been taken back."""
        self._unsent = 0
        self._given_ms = self.sent_ms
        if not self._spoken:
            self.item.spoken = SpokenText()
            self.item.spoken.add_text(self._sent_text, 0.0)

    def cut(self) -> None:
        """It was broken off: what could not be heard does not count as said."""
        if self._spoken:
            self.item.cut(round(self._given_ms))

    def close(self) -> None:
        text = self.item.text
        if self._spoken:
            self._tell("response.output_audio.done")
            self._tell("response.output_audio_transcript.done", transcript=text)
        else:
            self._tell("response.output_text.done", text=text)
        self._tell("response.content_part.done", part=self._part(text))

    def _part(self, text: str) -> dict[str, str]:
        return (
            {"type": "audio", "transcript": text}
            if self._spoken
            else {"type": "text", "text": text}
        )

    def _tell(self, kind: str, sent: Callable[[], None] | None = None, **fields: Any) -> None:
        self._outbox.put({"type": kind, **self._place, **fields}, self._of, sent)
