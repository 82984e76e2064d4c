"""Replies, played in order in a thread of its own."""

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np

RATE_HZ = 24_000
BYTES_A_MS = 2 * RATE_HZ // 1000
BLOCK = 20 * BYTES_A_MS  # bytes at a time: a stop waits for one of them at most


class Sink(Protocol):
    """Where 16-bit mono sound at 24 kHz goes."""

    latency_s: float  # what was written has been heard after that

    def write(self, pcm: bytes) -> None:
        """Returns when there is room for more."""

    def drop(self) -> None:
        """What was written and not yet heard is not heard any more."""

    def close(self) -> None:
        """What was written has been heard."""


class Nowhere:
    latency_s = 0.0

    def write(self, pcm: bytes) -> None: ...

    def drop(self) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Track:
    """One reply. In bytes."""

    item: str
    pushed: int = 0
    written: int = 0


class Player:
    """failure: why nothing can be played any more. level: in [0, 1], of what is being played."""

    def __init__(self, sink: Sink) -> None:
        self.failure: Exception | None = None
        self.level = 0.0
        self._sink = sink
        self._blocks: deque[tuple[Track, bytes]] = deque()
        self._tracks: list[Track] = []
        self._heard_s = 0.0  # when all that was written will have been heard
        self._dropping = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="player", daemon=True)
        self._thread.start()

    @property
    def active(self) -> bool:
        """Something is being heard, or waits to be."""
        return bool(self._blocks) or time.monotonic() < self._heard_s

    def push(self, item: str, pcm: bytes) -> None:
        with self._changed:
            if not self._tracks or self._tracks[-1].item != item:
                self._tracks.append(Track(item))
            track = self._tracks[-1]
            track.pushed += len(pcm)
            for at in range(0, len(pcm), BLOCK):
                self._blocks.append((track, pcm[at : at + BLOCK]))
            self._changed.notify()

    def stop(self) -> list[tuple[str, int]]:
        """Silence at once. Gives (item, milliseconds heard) of each reply that was cut."""
        with self._changed:
            unheard = int(max(0.0, self._heard_s - time.monotonic()) * 1000) * BYTES_A_MS
            cut: list[tuple[str, int]] = []
            for track in reversed(self._tracks):
                heard = max(0, track.written - unheard)
                unheard = max(0, unheard - track.written)
                if heard < track.pushed:
                    cut.append((track.item, heard // BYTES_A_MS))
            self._blocks.clear()
            self._tracks.clear()
            self._heard_s, self.level, self._dropping = 0.0, 0.0, True
            self._changed.notify()
        return cut[::-1]

    def close(self) -> None:
        """What waits is heard first; call `stop` before it for the contrary."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (block := self._next()) is not None:
                self._play(*block)
            self._sink.close()
        except Exception as exc:
            self.failure = exc
            self._blocks.clear()

    def _next(self) -> tuple[Track, bytes] | None:
        with self._changed:
            while not self._blocks:
                if self._dropping:
                    self._sink.drop()
                    self._dropping = False
                if self._closed:
                    return None
                self.level = 0.0
                self._changed.wait()
            dropping, self._dropping = self._dropping, False
            block = self._blocks.popleft()
            self._heard_s = time.monotonic() + len(block[1]) / BYTES_A_MS / 1000
        if dropping:
            self._sink.drop()
        return block

    def _play(self, track: Track, pcm: bytes) -> None:
        self._sink.write(pcm)
        with self._changed:
            if self._dropping:
                return
            track.written += len(pcm)
            self.level = loudness(pcm)
            self._heard_s = time.monotonic() + self._sink.latency_s


def loudness(pcm: bytes) -> float:
    """Root mean square in [0, 1] of 16-bit sound."""
    if len(pcm) < 2:
        return 0.0
    samples = np.frombuffer(pcm[: len(pcm) & ~1], "<i2").astype(np.float32) / 32768
    return float(np.sqrt(np.mean(samples**2)))
