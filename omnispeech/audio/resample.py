"""Sample rates: one stream of sound, in pieces of any length."""

import numpy as np
import soxr
from numpy.typing import NDArray

Samples = NDArray[np.float32]


class Resampler:
    """The joined output is the same for any cutting of the input, bit for bit.

    Pieces are [N] or [N, channels] float32. Equal rates pass through untouched.
    """

    def __init__(self, from_hz: int, to_hz: int, channels: int = 1) -> None:
        self._nothing = np.zeros((0,) if channels == 1 else (0, channels), np.float32)
        self._stream: soxr.ResampleStream | None = None
        if from_hz != to_hz:
            self._stream = soxr.ResampleStream(from_hz, to_hz, channels, dtype="float32")

    def push(self, samples: Samples) -> Samples:
        return samples if self._stream is None else self._stream.resample_chunk(samples)

    def finish(self) -> Samples:
        """What the filter still holds; nothing may be pushed after it."""
        if self._stream is None:
            return self._nothing
        return self._stream.resample_chunk(self._nothing, last=True)
