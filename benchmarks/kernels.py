"""How fast weights are multiplied, and how fast this machine can read them at all."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F

from omnispeech.layers.linear import QuantizedLinear
from omnispeech.layers.packing import QuantizedWeight

ROTATED_BYTES = 3 << 28  # weights take turns over so much memory, more than any cache holds
SHAPE = (12288, 4096)  # rows, columns of the largest linears of an 8 B model
GROUP = 128


def matvec(*, seconds: float = 10.0) -> dict[str, Any]:
    """One row times a 4096 x 12288 weight: 4 bits against bfloat16, on the CPU."""
    rows, columns = SHAPE
    x = torch.randn(1, columns, dtype=torch.bfloat16)
    int4 = [_int4(seed) for seed in range(-(-ROTATED_BYTES // _int4_bytes()))]
    plain = torch.randn(ROTATED_BYTES // (2 * rows * columns), rows, columns, dtype=torch.bfloat16)
    times = {
        "bfloat16": _best_s([partial(F.linear, x, w) for w in plain], seconds),
        "int4": _best_s([partial(layer, x) for layer in int4], seconds),
    }
    bandwidth = read_bandwidth()
    return {
        "kernel": int4[0].kernel_name,
        "threads": torch.get_num_threads(),
        "int4_ms": 1e3 * times["int4"],
        "bfloat16_ms": 1e3 * times["bfloat16"],
        "times_faster": times["bfloat16"] / times["int4"],
        "read_bandwidth": bandwidth,
        "int4_of_bandwidth": _int4_bytes() / times["int4"] / bandwidth,
        "bfloat16_of_bandwidth": 2 * rows * columns / times["bfloat16"] / bandwidth,
    }


def _int4(seed: int) -> QuantizedLinear:
    rows, columns = SHAPE
    generator = torch.Generator().manual_seed(seed)
    groups = columns // GROUP
    weight = QuantizedWeight(
        codes=torch.randint(16, (rows, columns), generator=generator, dtype=torch.uint8),
        zeros=torch.randint(16, (rows, groups), generator=generator, dtype=torch.uint8),
        scales=torch.rand(rows, groups, generator=generator).half() / 100,
        bits=4,
    )
    return QuantizedLinear(weight, None, dtype=torch.bfloat16, device=torch.device("cpu"))


def _int4_bytes() -> int:
    """Codes, and a scale and an offset of two bytes each for a group."""
    rows, columns = SHAPE
    return rows * columns // 2 + rows * columns // GROUP * 4


def _best_s(turns: Sequence[Callable[[], Any]], seconds: float) -> float:
    """Mean over the turns of the quickest time of each, which a busy machine disturbs least."""
    best, end = [float("inf")] * len(turns), time.perf_counter() + seconds
    while time.perf_counter() < end:
        for i, turn in enumerate(turns):
            began = time.perf_counter()
            turn()
            best[i] = min(best[i], time.perf_counter() - began)
    return fmean(best)


def read_bandwidth(seconds: float = 5.0) -> float:
    """Bytes per second that all threads together read from memory, summing them up."""
    parts = torch.ones(ROTATED_BYTES // 4).chunk(12)
    return parts[0].nbytes / _best_s([part.sum for part in parts], seconds)
