"""A trained language model of bytes, small enough to quantize again in every test run.

`byte_lm/` holds 0.65 M parameters trained by `benchmarks/training.py` on the sources of Python's
standard library (HOW.md there). Outliers are put into it without changing what it computes.
"""

from functools import cache
from pathlib import Path
from typing import Literal

from benchmarks.byte_lm import ByteLM, read_model
from benchmarks.outliers import MODERATE, STRONG, inject
from benchmarks.quality import (
    METHODS,
    Effort,
    HeldOut,
    Judged,
    calibration_text,
    held_out_text,
    judge,
)

TRAINED = Path(__file__).parent / "byte_lm"
EFFORT = Effort(seeds=1, calibration=24, evaluation=48)
Outlying = Literal["none", "moderate", "strong"]


@cache
def model_with(outliers: Outlying) -> ByteLM:
    plain = read_model(TRAINED)
    added = {"moderate": MODERATE, "strong": STRONG}
    return inject(plain, added[outliers]) if outliers in added else plain


@cache
def held_out(outliers: Outlying) -> HeldOut:
    return held_out_text(model_with(outliers), EFFORT)


@cache
def judged(method: str, outliers: Outlying) -> Judged:
    """A method of the benchmark, all with the same calibration text."""
    model = model_with(outliers)
    heard = calibration_text(model, EFFORT, seed=0)
    return judge(model, METHODS[method], heard, held_out(outliers))


def kl(method: str, outliers: Outlying) -> float:
    return judged(method, outliers).divergence.kl
