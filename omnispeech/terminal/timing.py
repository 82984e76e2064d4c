"""When things happened in one turn, and what that tells."""

from dataclasses import dataclass

import numpy as np

WINDOW_S = 0.02
AUDIBLE = 0.06  # of the loudest window of a turn


@dataclass(slots=True)
class Timing:
    """All moments on one clock of seconds. speech_end_s: None if nothing was spoken live."""

    asked_s: float  # the server has the whole question
    speech_end_s: float | None = None
    first_text_s: float | None = None
    first_audio_s: float | None = None
    done_s: float | None = None
    audio_s: float = 0.0
    gaps: int = 0  # times a player that starts at once has nothing to play
    gap_s: float = 0.0

    def text(self, now_s: float) -> None:
        if self.first_text_s is None:
            self.first_text_s = now_s

    def audio(self, now_s: float, seconds: float) -> None:
        if self.first_audio_s is None:
            self.first_audio_s = now_s
        late_s = now_s - (self.first_audio_s + self.audio_s + self.gap_s)
        if late_s > 0:
            self.gaps += 1
            self.gap_s += late_s
        self.audio_s += seconds

    def report(self) -> str:
        parts = []
        if self.speech_end_s is not None:
            parts.append(f"endpointing {max(0.0, self.asked_s - self.speech_end_s):.2f} s")
        if self.first_text_s is not None:
            parts.append(f"first text after {self.first_text_s - self.asked_s:.2f} s")
        return ", ".join(parts + self._sound())

    def _sound(self) -> list[str]:
        total_s = (self.done_s if self.done_s is not None else self.asked_s) - self.asked_s
        if self.first_audio_s is None:
            return [f"{total_s:.2f} s in all, without sound"]
        gaps = f"gaps: {self.gaps}, {self.gap_s:.2f} s in all" if self.gaps else "no gaps"
        return [
            f"first audio after {self.first_audio_s - self.asked_s:.2f} s",
            f"{self.audio_s:.2f} s of sound in {total_s:.2f} s",
            f"real-time factor {total_s / self.audio_s:.2f}",
            gaps,
        ]


def end_of_speech_s(pcm: bytes, rate_hz: int) -> float:
    """Seconds from the beginning to the end of the last loud part of 16-bit mono sound."""
    window = int(WINDOW_S * rate_hz)
    samples = np.abs(np.frombuffer(pcm, "<i2").astype(np.float32))
    loudness = samples[: len(samples) // window * window].reshape(-1, window).mean(axis=1)
    loud = np.flatnonzero(loudness > AUDIBLE * loudness.max(initial=0.0))
    return float(loud[-1] + 1) * WINDOW_S if len(loud) else 0.0
