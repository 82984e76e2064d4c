"""What the listener of one reply has been sent, and has not heard yet."""

from dataclasses import dataclass

COMFORT_S = 1.0  # a reply this far ahead of its listener can wait for others


@dataclass(slots=True)
class Playback:
    """On the clock of the engine."""

    started_s: float | None = None
    sent_s: float = 0.0

    def sent(self, seconds: float, now_s: float) -> None:
        if self.started_s is None:
            self.started_s = now_s
        # after a gap the listener's clock starts again
        self.started_s = max(self.started_s, now_s - self.sent_s)
        self.sent_s += seconds

    def ahead_s(self, now_s: float) -> float | None:
        """Unheard seconds; negative: silent since; None: nothing was sent yet."""
        return None if self.started_s is None else self.started_s + self.sent_s - now_s
