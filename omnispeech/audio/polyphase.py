"""Sample rates of sound that somebody is waiting for.

The streams of soxr (`resample.Resampler`) work in blocks and hold back up to 42 ms between 22.05
and 24 kHz, and up to 118 ms from and to 8 kHz. This one holds back half the length of its filter:
2 to 6 ms. (The variable-rate mode of soxr holds back 10 to 30 ms, and what comes out is not on the
time of what went in.) soxr stays the reference that the tests compare it with.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from omnispeech.audio.resample import Samples

ZERO_CROSSINGS = 48  # of the sinc, on each side of its middle
STOPBAND_DB = 90.0
KAISER_BETA = 0.1102 * (STOPBAND_DB - 8.7)
NOTHING = np.zeros(0, np.float32)


class LiveResampler:
    """Mono. The joined output is the same for any cutting of the input, bit for bit, and lies on
    the input's time: its first sample is at the time of the first one pushed.

    A windowed sinc, one set of taps for each place that an output can have between two inputs.
    After `finish`, n samples have become round(n * to_hz / from_hz). Equal rates pass untouched.
    """

    def __init__(self, from_hz: int, to_hz: int) -> None:
        common = math.gcd(from_hz, to_hz)
        self._up, self._down = to_hz // common, from_hz // common
        self._taps = _taps(from_hz, to_hz)  # [up, K]
        self._half = self._taps.shape[1] // 2
        self._sound = np.zeros(self._half - 1, np.float32)  # from `_first` on
        self._first = 1 - self._half
        self._pushed = 0
        self._made = 0

    @property
    def _passes(self) -> bool:
        return self._up == self._down

    def push(self, samples: Samples) -> Samples:
        """[N] -> [about N * to_hz / from_hz]"""
        if self._passes:
            return samples
        self._pushed += len(samples)
        self._sound = np.concatenate([self._sound, samples], dtype=np.float32)
        # an output between the inputs i and i + 1 reads up to input i + half
        return self._make(_ceil((self._pushed - self._half) * self._up, self._down))

    def finish(self) -> Samples:
        """What the filter still holds; nothing may be pushed after it."""
        if self._passes:
            return NOTHING
        self._sound = np.concatenate([self._sound, np.zeros(self._half + 1, np.float32)])
        return self._make((2 * self._pushed * self._up + self._down) // (2 * self._down))

    def _make(self, until: int) -> Samples:
        """Outputs [made, until). Those that are `up` apart have the same taps, and lie `down`
        inputs apart: one product for each place between two inputs, without a copy."""
        out = np.empty(max(0, until - self._made), np.float32)
        for number in range(min(self._up, len(out))):
            step, phase = divmod((self._made + number) * self._down, self._up)
            windows = self._windows(step - (self._half - 1) - self._first, out[number :: self._up])
            np.vecdot(windows, self._taps[phase], out=out[number :: self._up])  # [N, K] -> [N]
        self._made += len(out)
        self._forget()
        return out

    def _windows(self, begin: int, out: Samples) -> Samples:
        """[N, K] what each of the outputs reads; the first from `begin` on"""
        return np.ndarray(
            (len(out), 2 * self._half),
            np.float32,
            self._sound,
            offset=begin * self._sound.itemsize,
            strides=(self._down * self._sound.itemsize, self._sound.itemsize),
        )

    def _forget(self) -> None:
        """All that no output to come reads."""
        begin = self._made * self._down // self._up - (self._half - 1)
        if begin > self._first:
            self._sound = self._sound[begin - self._first :].copy()
            self._first = begin


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


@lru_cache(maxsize=16)
def _taps(from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """[up, K]: for an output p / up of an input sample after an input, the weights of the K inputs
    around it. The stopband begins at half the lower rate, so that nothing folds back."""
    low_hz = min(from_hz, to_hz)
    seconds = 2 * ZERO_CROSSINGS / low_hz
    transition_hz = (STOPBAND_DB - 7.95) / (14.36 * seconds)  # Kaiser's rule
    cutoff_hz = low_hz / 2 - transition_hz / 2
    half = math.ceil(seconds / 2 * from_hz)
    up = to_hz // math.gcd(from_hz, to_hz)
    distance = np.arange(1 - half, half + 1) - np.arange(up)[:, None] / up  # [up, K] input samples
    bent = np.sqrt(np.clip(1 - (distance / half) ** 2, 0, None))
    taps = np.sinc(2 * cutoff_hz / from_hz * distance) * np.i0(KAISER_BETA * bent)
    return (taps / taps.sum(axis=1, keepdims=True)).astype(np.float32)
