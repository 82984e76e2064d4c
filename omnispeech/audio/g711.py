"""G.711, the sound of telephones: 8 bits for each sample, in steps that grow with the loudness.

Both laws cut a magnitude into eight segments of sixteen equal steps (ITU-T G.711, tables 1 and 2).
Here they stand on the scale of 16 bits: the 14 bits of the mu-law times 4, the 13 of the A-law
times 8. Sign and magnitude are coded apart, so that x and -x differ in the sign bit alone.

All functions work sample by sample and know no state: any cutting of a stream gives the same.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]
PCM16 = NDArray[np.int16]

SIGN = 0x80
ULAW_BIAS = 132  # 33 on the scale of the standard; with it every segment begins at a power of two
ULAW_LOUDEST = 32_635  # what lies above has no step of its own: it is clipped
ALAW_INVERTED = 0x55  # on the line, every other bit is turned over
ALL_CODES = np.arange(256)


def encode_ulaw(pcm: PCM16) -> Codes:
    """[N] -> [N]"""
    return _ulaw_codes()[pcm.view(np.uint16)]


def decode_ulaw(codes: Codes) -> PCM16:
    """[N] -> [N]"""
    return _ulaw_values()[codes]


def encode_alaw(pcm: PCM16) -> Codes:
    """[N] -> [N]"""
    return _alaw_codes()[pcm.view(np.uint16)]


def decode_alaw(codes: Codes) -> PCM16:
    """[N] -> [N]"""
    return _alaw_values()[codes]


@lru_cache(maxsize=1)
def _ulaw_values() -> PCM16:
    """[256]; a code is inverted on the line, and its sign bit means negative."""
    code = ALL_CODES ^ 0xFF
    segment, step = code >> 4 & 7, code & 15
    magnitude = ((step << 3) + ULAW_BIAS << segment) - ULAW_BIAS
    return np.where(code & SIGN, -magnitude, magnitude).astype(np.int16)


@lru_cache(maxsize=1)
def _ulaw_codes() -> Codes:
    """[65536], by the two's complement of the sample"""
    values, magnitude = _all_samples()
    biased = np.minimum(magnitude, ULAW_LOUDEST) + ULAW_BIAS
    segment = _highest_bit(biased) - 7
    step = biased >> segment + 3 & 15
    sign = np.where(values < 0, SIGN, 0)
    return ((sign | segment << 4 | step) ^ 0xFF).astype(np.uint8)


@lru_cache(maxsize=1)
def _alaw_values() -> PCM16:
    """[256]; the sign bit means positive, and a value is the middle of its step."""
    code = ALL_CODES ^ ALAW_INVERTED
    segment, step = code >> 4 & 7, code & 15
    curved = (step << 4) + 0x108 << np.maximum(segment - 1, 0)
    magnitude = np.where(segment, curved, (step << 4) + 8)
    return np.where(code & SIGN, magnitude, -magnitude).astype(np.int16)


@lru_cache(maxsize=1)
def _alaw_codes() -> Codes:
    """[65536], by the two's complement of the sample; the first two segments have equal steps."""
    values, magnitude = _all_samples()
    magnitude = np.minimum(magnitude, 32_767)
    segment = np.maximum(_highest_bit(magnitude) - 7, 0)
    step = magnitude >> np.maximum(segment, 1) + 3 & 15
    sign = np.where(values < 0, 0, SIGN)
    return ((sign | segment << 4 | step) ^ ALAW_INVERTED).astype(np.uint8)


def _all_samples() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(value, magnitude) of each of the 65536, by two's complement"""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.int16).astype(np.int64)
    return values, np.abs(values)


def _highest_bit(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Its place, from 0; of 0 it is 0."""
    return (np.frexp(np.maximum(numbers, 1))[1] - 1).astype(np.int64)
