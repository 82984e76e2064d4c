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
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._bar = self._stream.isatty()
        self._clock = clock
        self._layers = self._before = 0
        self._began = clock()
        self._drawn = 0  # characters of the bar that is on the screen

    def say(self, lines: Iterable[str]) -> None:
        """Lines of their own, above the bar."""
        self._wipe()
        for line in lines:
            self._stream.write(f"{line}\n")
        self._stream.flush()

    def start(self, layers: int, done: int) -> None:
        """done: layers that an earlier run has finished."""
        self._layers, self._before, self._began = layers, done, self._clock()
        self._show(done, "")

    def layer(self, done: int, loss: float | None, peak: Peak) -> None:
        """`done` layers are finished; loss is the mean of the last one's linears, None if kept."""
        left = (self._clock() - self._began) / (done - self._before) * (self._layers - done)
        device = f", device {size_text(peak.vram)}" if peak.vram else ""
        error = "kept" if loss is None else f"loss {loss:.3g}"
        self._show(done, f"{error}, memory {size_text(peak.ram)}{device}, {duration(left)} left")

    def finish(self) -> None:
        """Leaves the bar where it is; what follows begins on a line of its own."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = 0

    def _show(self, done: int, text: str) -> None:
        count = f"layer {done}/{self._layers}"
        if not self._bar:
            self.say([f"{count}: {text}" if text else f"{count} done before"] if done else [])
            return
        filled = WIDTH * done // max(1, self._layers)
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
