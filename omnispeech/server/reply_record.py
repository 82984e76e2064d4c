"""What is known of one reply: noted while it is made, read when it has ended.

Times are those of one clock, in seconds: a piece of sound has the moment at which it was handed to
the route that sends it.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from omnispeech.engine.events import AudioDelta, Done, Event, TextDelta, TurnRequest
from omnispeech.server.access.callers import CALLER, Caller

# stop, length: the reply is whole, ended by the model or by a limit; cut: the server stopped
Outcome = Literal["stop", "length", "cancelled", "cut", "failed", "unavailable", "refused"]

LOUD = 104  # of 32768: what stays under it (-50 dB of full scale) is silence
PCM_BYTES = 2


class Piece(NamedTuple):
    at_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Playback:
    """What a player hears that begins with the first piece and waits where one is late."""

    underrun_s: float  # all of its waiting
    longest_wait_s: float


@dataclass(slots=True, kw_only=True)
class ReplyRecord:
    """asked_s: when the question was whole. None: it may not be, the reply is a guess."""

    request: TurnRequest
    begun_s: float
    asked_s: float | None
    caller: Caller = field(default_factory=CALLER.get)
    first_text_s: float | None = None
    first_sound_s: float | None = None  # when the first piece came that is not all silence
    silence_s: float = 0.0  # of the sound's beginning
    pieces: list[Piece] = field(default_factory=list)
    outcome: Outcome | None = None  # None: it is not at its end
    done: Done | None = None
    ended_s: float = 0.0

    def note(self, event: Event, rate_hz: int, now_s: float) -> None:
        if isinstance(event, AudioDelta):
            self.pieces.append(Piece(now_s, len(event.pcm) / PCM_BYTES / rate_hz))
            if self.first_sound_s is None:
                self._listen(event.pcm, rate_hz, now_s)
        elif isinstance(event, TextDelta) and self.first_text_s is None:
            self.first_text_s = now_s
        elif isinstance(event, Done):
            self.done = event

    def _listen(self, pcm: bytes, rate_hz: int, now_s: float) -> None:
        quiet = leading_silence(pcm)
        self.silence_s += quiet / rate_hz
        if quiet < len(pcm) // PCM_BYTES:
            self.first_sound_s = now_s

    def end(self, outcome: Outcome, now_s: float) -> None:
        self.outcome, self.ended_s = outcome, now_s

    @property
    def audio_s(self) -> float:
        """Seconds of sound that were handed over."""
        return sum(piece.seconds for piece in self.pieces)

    def after_question_s(self, moment_s: float | None) -> float | None:
        """0 if a guess had it before the question was whole."""
        if moment_s is None or self.asked_s is None:
            return None
        return max(0.0, moment_s - self.asked_s)

    @property
    def total_s(self) -> float:
        return self.after_question_s(self.ended_s) or 0.0

    @property
    def queue_s(self) -> float:
        """Of the caller's waiting: a guess may have been in the queue before."""
        if self.done is None or self.asked_s is None:
            return 0.0
        return max(0.0, self.begun_s + self.done.queue_s - self.asked_s)

    @property
    def handed_over(self) -> list[Piece]:
        """The pieces; those that a guess had ready were handed over when it was committed."""
        return [Piece(max(at_s, self.asked_s or at_s), seconds) for at_s, seconds in self.pieces]


def leading_silence(pcm: bytes) -> int:
    """pcm: 16 bit, mono -> samples before the first that can be heard; all, if there is none."""
    samples = np.frombuffer(pcm, "<i2")
    loud = (samples >= LOUD) | (samples <= -LOUD)
    return int(loud.argmax()) if loud.any() else len(samples)


def played(pieces: list[Piece]) -> Playback:
    """pieces: in order, of a reply with sound."""
    underrun_s = longest_s = 0.0
    ends_s = pieces[0].at_s
    for at_s, seconds in pieces:
        wait_s = max(0.0, at_s - ends_s)
        underrun_s += wait_s
        longest_s = max(longest_s, wait_s)
        ends_s = max(ends_s, at_s) + seconds
    return Playback(underrun_s, longest_s)
