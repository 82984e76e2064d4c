"""Columns whose rounding error is heard the most: a list, and an int8 residual beside the file
(spec: quantization 7)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LISTED = 32  # columns in the dump
OUTLIER = 20  # times the median of E|x|


@dataclass(frozen=True, slots=True, eq=False)
class SalientColumns:
    """What is to be added: x[:, columns] @ (residual * scales).T"""

    columns: Tensor  # [S] int64, rising
    residual: Tensor  # [N, S] int8
    scales: Tensor  # [S] float16


def column_scores(error: Tensor, energy: Tensor) -> Tensor:
    """error: [N, K], energy: [K] E[x^2] -> [K], the energy that each column's error puts out."""
    return error.square().sum(0) * energy


def describe(error: Tensor, energy: Tensor, magnitude: Tensor) -> dict[str, Any]:
    """The columns of a linear whose errors are heard most, for its report.

    error: [N, K], energy: [K] E[x^2], magnitude: [K] E|x| before channels were scaled.
    rank is the place of a column among all by E[x^2], 0 the largest.
    """
    scores = column_scores(error, energy)
    best = scores.argsort(descending=True, stable=True)[:LISTED]
    total = float(scores.sum()) or 1.0
    rank = energy.argsort(descending=True, stable=True).argsort()
    median = float(magnitude.median())
    outliers = (magnitude > OUTLIER * median).nonzero()[:, 0]
    return {
        "columns": [
            {"index": int(k), "score": float(scores[k]), "rank": int(rank[k])} for k in best
        ],
        "share": float(scores[best].sum()) / total,
        "outliers": [
            {"index": int(k), "times_median": float(magnitude[k]) / max(median, 1e-30)}
            for k in outliers
        ],
    }


def residual_columns(error: Tensor, energy: Tensor, quota: float) -> SalientColumns:
    """error: [N, K], stored minus true weight; quota: share of the columns, at least one."""
    count = max(1, round(quota * error.shape[1]))
    columns = column_scores(error, energy).argsort(descending=True, stable=True)[:count]
    columns = columns.sort().values
    missing = -error[:, columns]  # [N, S]
    scales = (missing.abs().amax(0) / 127).clamp_min(2.0**-24).half()
    residual = (missing / scales.float()).round().clamp(-127, 127).to(torch.int8)
    return SalientColumns(columns, residual, scales)
