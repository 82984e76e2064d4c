"""What a run says while it works: one bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable
from typing import TextIO

from omnispeech.checkpoint.files import size_text
from omnispeech.quantization.memory import Peak

WIDTH = 30  # characters of the bar


class Progress:
    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        count: str = "layer {}/{}",
        every_s: float = 0.0,
    ) -> None:
        """every_s: seconds between two lines at least; a bar is drawn at every step."""
        self._stream = stream if stream is not None else sys.stderr
        self._bar = self._stream.isatty()
        self._clock = clock
        self._count, self._every_s = count, every_s
        self._steps = self._before = 0
        self._began = self._said = clock()
        self._drawn = 0  # characters of the bar that is on the screen

    def say(self, lines: Iterable[str]) -> None:
        """Lines of their own, above the bar."""
        self._wipe()
        for line in lines:
            self._stream.write(f"{line}\n")
        self._stream.flush()

    def start(self, steps: int, done: int) -> None:
        """done: those that an earlier run has finished."""
        self._steps, self._before = steps, done
        self._began = self._said = self._clock()
        self._show(done, "")

    def layer(self, done: int, loss: float | None, peak: Peak) -> None:
        """`done` layers are finished; loss is the mean of the last one's linears, None if kept."""
        device = f", device {size_text(peak.vram)}" if peak.vram else ""
        error = "kept" if loss is None else f"loss {loss:.3g}"
        self.step(done, f"{error}, memory {size_text(peak.ram)}{device}, ")

    def step(self, done: int, text: str = "") -> None:
        """`done` steps are finished; how long the others take is said behind `text`."""
        now = self._clock()
        early = done < self._steps and now - self._said < self._every_s
        if done == self._before or (early and not self._bar):
            return
        self._said = now
        left = (now - self._began) / (done - self._before) * (self._steps - done)
        self._show(done, f"{text}{duration(left)} left")

    def finish(self) -> None:
        """Leaves the bar where it is; what follows begins on a line of its own."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = 0

    def _show(self, done: int, text: str) -> None:
        count = self._count.format(done, self._steps)
        if not self._bar:
            self.say([f"{count}: {text}" if text else f"{count} done before"] if done else [])
            return
        filled = WIDTH * done // max(1, self._steps)
        line = f"[{'#' * filled}{'.' * (WIDTH - filled)}] {count} {text}"
        self._wipe()
        self._stream.write(line)
        self._stream.flush()
        self._drawn = len(line)

    def _wipe(self) -> None:
        if self._drawn:
            self._stream.write(f"\r{' ' * self._drawn}\r")
            self._drawn = 0


def duration(seconds: float) -> str:
    """3725 -> 1 h 02 min"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
