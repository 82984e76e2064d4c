"""One reply in the making."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omnispeech.engine.events import AudioDelta, Done, Event, TextDelta, ToolCall, TurnRequest
from omnispeech.engine.interleave import Interleaver, Rules, SpeechInput
from omnispeech.engine.playback import Playback
from omnispeech.engine.reply_text import ReplyText
from omnispeech.engine.sampling import Sampler

if TYPE_CHECKING:  # tensors are the runner's; decisions need none
    from torch import Tensor

    from omnispeech.engine.prefix_cache import Position
    from omnispeech.engine.vocoder import VocoderStream
    from omnispeech.layers.kv_cache import Row
    from omnispeech.prompt import TextStream

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False, kw_only=True)
class Session:
    request: TurnRequest
    rules: Rules
    prompt: list[int]  # ids, audio slots not yet expanded
    features: list[Callable[[], "Tensor"]]  # [..., T] of each audio, as its encoder reads them
    valid_frames: list[int]  # of T
    audio_lengths: list[int]  # prompt positions of each audio
    key: "Sequence[Position]"  # of the prompt, for the prefix cache
    text_sampler: Sampler
    speech_sampler: Sampler
    text_stream: "TextStream"
    script: Sequence[int] = ()  # text ids of the reply, in place of what the LLM chooses
    unit_audio_s: float  # seconds of sound per unit
    seed: int
    emit: Callable[[Event | Exception], None]
    interleaver: Interleaver = field(init=False)
    text: ReplyText = field(init=False)
    playback: Playback = field(default_factory=Playback)
    created_s: float  # when the request came, by time.perf_counter

    # on the device, from admission to the end
    vocoder: "VocoderStream" = field(init=False, repr=False)  # none where nothing is spoken
    llm_row: "Row | None" = None
    speech_row: "Row | None" = None  # none where nothing is spoken
    reused: int = 0  # prompt positions that an earlier conversation has read
    frames: list["Tensor"] = field(default_factory=list)  # [T, D] of each audio, encoded
    prompt_vectors: "Tensor | None" = None  # [L, D] of the others, from the encoder on
    conditions: deque["Tensor"] = field(default_factory=deque)  # states the speech LM will read
    speech_input: SpeechInput | None = None  # decided, not yet computed
    pending_units: list[int] = field(default_factory=list)  # codes not yet decoded
    blocks: int = 0  # decoded
    flushed: bool = False  # the vocoder has given everything

    cancelled: bool = False
    failed: bool = False
    queue_s: float = 0.0
    first_text_s: float = 0.0
    first_audio_s: float = 0.0

    def __post_init__(self) -> None:
        self.interleave(self.rules)

    def interleave(self, rules: Rules) -> None:
        """From the beginning, by `rules`."""
        self.interleaver = Interleaver(rules)
        calls = bool(self.request.tools) and not self.script
        self.text = ReplyText(self.text_stream, self.interleaver, self.unit_audio_s, calls=calls)

    @property
    def over(self) -> bool:
        return self.cancelled or self.failed or self.whole

    @property
    def whole(self) -> bool:
        return self.interleaver.done and self.sound_over

    @property
    def sound_over(self) -> bool:
        """There is no block of sound to come."""
        return self.flushed or self.interleaver.silent

    @property
    def prompt_length(self) -> int:
        """Positions after splicing."""
        return len(self.key)

    @property
    def prompt_left(self) -> int:
        """Prompt positions the LLM has not read."""
        return self.prompt_length - (self.llm_row.length if self.llm_row else 0)

    @property
    def prefilling(self) -> bool:
        return not self.interleaver.text_ids and self.prompt_left > 0

    @property
    def heard(self) -> bool:
        """Its sound has been through the encoder, its prompt can be read."""
        return self.prompt_vectors is not None

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.created_s

    def write(self, token: int) -> None:
        """The LLM chose `token`."""
        self._send(self.text.push(token))
        self.finish()

    def finish(self) -> None:
        """What is left to send once the text has ended, and once the sound has too."""
        if self.interleaver.text_finish is not None:
            self._send(self.text.finish())
        if self.whole:
            self._send_done()

    def _send(self, events: Sequence[TextDelta | ToolCall]) -> None:
        for event in events:
            if isinstance(event, TextDelta):
                self.first_text_s = self.first_text_s or self.elapsed_s
            self.emit(event)

    def send_audio(self, pcm: bytes, seconds: float) -> None:
        if pcm:
            self.first_audio_s = self.first_audio_s or self.elapsed_s
            self.playback.sent(seconds, time.perf_counter())
            self.emit(AudioDelta(pcm))

    def _send_done(self) -> None:
        text, speech = self.interleaver.text_finish, self.interleaver.speech_finish
        assert text is not None and speech is not None
        self.emit(
            Done(
                text_finish=text,
                speech_finish=speech,
                prompt_tokens=self.prompt_length,
                text_tokens=len(self.interleaver.text_ids),
                units=self.vocoder.units if self.rules.speech else 0,
                seed=self.seed,
                first_text_s=self.first_text_s,
                first_audio_s=self.first_audio_s,
                total_s=self.elapsed_s,
                audio_s=self.playback.sent_s,
                audio_tokens=sum(self.audio_lengths),
                cached_tokens=self.reused,
                queue_s=self.queue_s,
            )
        )

    @contextmanager
    def own_errors(self) -> Iterator[None]:
        """What goes wrong inside is this reply's error: the thread goes on with the others."""
        try:
            yield
        except Exception as error:
            logger.exception("a reply failed")
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Tells this caller, and nobody else."""
        self.failed = True
        # its traceback would keep the tensors of the failed call alive
        self.emit(error.with_traceback(None))
