"""How far a fetch is: a bar on a terminal, elsewhere a line of log every few seconds."""

import logging
import sys
import threading
import time

from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from omnispeech.checkpoint.whole_file import size_text

logger = logging.getLogger(__name__)

EVERY_S = 5.0


class Progress:
    """`add` is for any thread, the rest for the one that waits."""

    def __init__(self, name: str, total: int, done: int = 0, *, every_s: float = EVERY_S) -> None:
        """total, done: bytes of the whole directory, and of those that were here before."""
        self._name, self._total, self._done = name, total, done
        self._lock = threading.Lock()
        self._every_s = every_s
        self._began = self._told_at = time.monotonic()
        self._before = self._shown = done
        self._bar = _bar(name, total, done) if sys.stderr.isatty() else None

    def add(self, size: int) -> None:
        """size: negative for bytes that were of no use."""
        with self._lock:
            self._done += size

    def show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._done - self._shown)
            self._shown = self._done
        elif time.monotonic() - self._told_at >= self._every_s:
            self._told_at = time.monotonic()
            logger.info("%s", self.line())

    def line(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-6)
        rate = (self._done - self._before) / seconds
        left = f"{(self._total - self._done) / rate:.0f} s left" if rate > 0 else "nothing came yet"
        share = 100 * self._done / max(self._total, 1)
        return (
            f"{self._name}: {size_text(self._done)} of {size_text(self._total)} ({share:.0f} %), "
            f"{size_text(int(max(rate, 0)))}/s, {left}"
        )

    def close(self) -> None:
        if self._bar is not None:
            self.show()
            self._bar.close()


def _bar(name: str, total: int, done: int) -> tqdm:
    return tqdm(  # type: ignore[no-untyped-call]
        desc=name, total=total, initial=done, unit="B", unit_scale=True
    )
