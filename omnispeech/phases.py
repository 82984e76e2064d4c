"""What a start spends its time on: one line of log per phase, the same figures for /ready and
/metrics."""

import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Phase:
    seconds: float = 0.0
    size: int = 0  # bytes read from disk; 0: it reads none


class Phases:
    """Phases of one start, in order; written by one thread, read by others."""

    def __init__(self) -> None:
        self._done: dict[str, Phase] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[Phase]:
        """Whoever measures sets `size` of what is yielded; a phase that fails is not told."""
        phase, began = Phase(), time.perf_counter()
        yield phase
        phase.seconds = time.perf_counter() - began
        self._done[name] = phase
        logger.info("%s: %.1f s%s", name, phase.seconds, _size(phase))

    def done(self) -> dict[str, Phase]:
        return dict(self._done)


def peak_memory() -> int:
    """Bytes of memory that this process held at most, so far."""
    # not of getrusage, which begins with what the process that forked this one held
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _size(phase: Phase) -> str:
    if not phase.size:
        return ""
    if phase.size < 10**8:  # of a small checkpoint: there is no speed to speak of
        return f", {phase.size / 1e6:.1f} MB" if phase.size >= 10**5 else f", {phase.size} bytes"
    return f", {phase.size / 1e9:.2f} GB, {phase.size / 1e9 / max(phase.seconds, 1e-9):.2f} GB/s"
