"""Who has the floor: from probabilities of speech to the turns of a conversation (server_vad).

Each window of 32 ms is speech from `threshold` up and silence below `threshold - 0.15` (the
hysteresis of Silero's own iterator); between the two it goes on with what was.

A turn begins with SHORTEST_SPEECH_MS of speech, so that clicks begin none. It ends when no speech
has come for `silence_duration_ms`. Its sound is [first speech - prefix_padding_ms, end of speech +
tail), where the tail is the shorter of `speculate_ms` and `silence_duration_ms`. An answer begun at
Paused has therefore heard exactly what SpeechStopped commits, if no Resumed came between,
whatever settings change meanwhile.

Events and their times depend on the sound alone, not on how it was cut.
"""

from dataclasses import dataclass

from omnispeech.audio.resample import Samples
from omnispeech.audio.vad import WINDOW_MS, Probabilities
from omnispeech.server.realtime.settings.turn_settings import ServerVAD

SHORTEST_SPEECH_MS = 64  # two windows
HYSTERESIS = 0.15
LOWEST_END = 0.01  # of the threshold for silence: at a threshold of 0.1 a turn can still end
LONGEST_MS = 120_000


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    """The turn's sound begins at start_ms, the padding included."""

    start_ms: int


@dataclass(frozen=True, slots=True)
class Paused:
    """It has been silent for `speculate_ms`; if the turn is over, this is its sound."""

    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """Speech goes on after a pause: what was begun at Paused is void."""


@dataclass(frozen=True, slots=True)
class SpeechStopped:
    """The turn is over; its sound is [start_ms, end_ms)."""

    start_ms: int
    end_ms: int


TurnEvent = SpeechStarted | Paused | Resumed | SpeechStopped


class TurnDetector:
    """The turns of one stream of sound.

    `start_ms` is where the stream begins on the clock of the conversation; all times are on that
    clock. A turn is stopped before it gets longer than `longest_ms`, although speech goes on, and
    the next one begins. `speculate_ms` 0: no pauses are told, and all of `silence_duration_ms`
    belongs to the turn. With a threshold of 0 everything is speech and no turn ends before
    `longest_ms`; with one above every probability none begins.
    """

    def __init__(
        self,
        vad: ServerVAD,
        speculate_ms: int,
        detector: Probabilities,
        *,
        start_ms: int = 0,
        longest_ms: int = LONGEST_MS,
    ) -> None:
        self._vad = vad
        self._speculate_ms = speculate_ms
        self._detector = detector
        self._longest_ms = longest_ms
        self.reset(start_ms)

    def reset(self, start_ms: int) -> None:
        """No turn is open, and nothing before `start_ms` belongs to one."""
        self._detector.reset()
        self._now_ms = start_ms  # the end of the last window
        self._floor_ms = start_ms  # the end of the turn before
        self._forget_speech()

    def _forget_speech(self) -> None:
        self._speech_from_ms: int | None = None  # of speech that may become a turn
        self._speech_ms = 0
        self._start_ms: int | None = None  # of the open turn
        self._silent_from_ms: int | None = None  # within it
        self._paused_ms: int | None = None  # the end_ms of the Paused that holds

    def change(self, vad: ServerVAD) -> None:
        """From the next window on; an open turn stays open."""
        self._vad = vad

    @property
    def speaking(self) -> bool:
        return self._start_ms is not None

    @property
    def needed_from_ms(self) -> int:
        """No event to come refers to sound before this."""
        return self._padded_ms() if self._start_ms is None else self._start_ms

    def push(self, samples: Samples) -> list[TurnEvent]:
        """[N] of the next sound at 16 kHz -> what has become certain with it"""
        events: list[TurnEvent] = []
        for probability in self._detector.push(samples):
            self._now_ms += WINDOW_MS
            if self._start_ms is None:
                events += self._before_speech(probability)
            else:
                events += self._in_speech(probability, self._start_ms)
        return events

    def _before_speech(self, probability: float) -> list[TurnEvent]:
        if probability >= self._vad.threshold:
            if self._speech_from_ms is None:
                self._speech_from_ms = self._now_ms - WINDOW_MS
            self._speech_ms += WINDOW_MS
        elif probability < self._end_threshold:
            self._speech_from_ms, self._speech_ms = None, 0
        if self._speech_ms < SHORTEST_SPEECH_MS:
            return []
        self._start_ms = self._padded_ms()
        return [SpeechStarted(self._start_ms)]

    def _padded_ms(self) -> int:
        """Where a turn begins whose speech begins now, or has begun."""
        speech = self._now_ms if self._speech_from_ms is None else self._speech_from_ms
        longest = self._now_ms + WINDOW_MS - self._longest_ms
        return max(self._floor_ms, speech - self._vad.prefix_padding_ms, longest)

    def _in_speech(self, probability: float, start_ms: int) -> list[TurnEvent]:
        events = self._silence(probability, start_ms)
        if self.speaking and self._now_ms + WINDOW_MS - start_ms > self._longest_ms:
            return [*events, self._stop(start_ms, self._now_ms)]
        return events

    def _silence(self, probability: float, start_ms: int) -> list[TurnEvent]:
        if probability >= self._vad.threshold:
            was_paused = self._paused_ms is not None
            self._silent_from_ms, self._paused_ms = None, None
            return [Resumed()] if was_paused else []
        if self._silent_from_ms is None and probability < self._end_threshold:
            self._silent_from_ms = self._now_ms - WINDOW_MS
        return self._after(self._silent_from_ms, start_ms)

    def _after(self, silent_from_ms: int | None, start_ms: int) -> list[TurnEvent]:
        """What so much silence means."""
        if silent_from_ms is None:
            return []
        silent_ms = self._now_ms - silent_from_ms
        end_ms = silent_from_ms + self._tail_ms
        if silent_ms >= self._vad.silence_duration_ms:
            return [self._stop(start_ms, end_ms)]
        if self._speculates and self._paused_ms is None and silent_ms >= self._tail_ms:
            self._paused_ms = end_ms
            return [Paused(start_ms, end_ms)]
        return []

    def _stop(self, start_ms: int, end_ms: int) -> SpeechStopped:
        """At `end_ms`, or where it paused: what was told there holds."""
        end_ms = end_ms if self._paused_ms is None else self._paused_ms
        self._floor_ms = end_ms
        self._forget_speech()
        return SpeechStopped(start_ms, end_ms)

    @property
    def _end_threshold(self) -> float:
        return max(self._vad.threshold - HYSTERESIS, LOWEST_END)

    @property
    def _speculates(self) -> bool:
        return 0 < self._speculate_ms < self._vad.silence_duration_ms

    @property
    def _tail_ms(self) -> int:
        """Silence that belongs to the turn."""
        return self._speculate_ms if self._speculates else self._vad.silence_duration_ms
