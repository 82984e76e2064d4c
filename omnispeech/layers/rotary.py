"""Rotary position embedding with half-split rotation: dimension j is paired with j + D / 2."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """The stretched frequencies of Llama 3.1, rope type `llama3`.

    Slow frequencies are divided by `factor`, fast ones are kept, those between are blended. How
    fast one is: its turns within `original_context` positions.
    """

    factor: float
    low_freq_factor: float  # turns; below is slow
    high_freq_factor: float  # turns; above is fast
    original_context: int

    def __post_init__(self) -> None:
        if not (self.factor > 0 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(f"{self} blends nothing")

    def stretch(self, frequencies: Tensor) -> Tensor:
        """[head_dim / 2] radians per position -> the same shape"""
        turns = self.original_context * frequencies / (2 * math.pi)
        between = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / between).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotary_table(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """positions: [T] -> cos, sin: [T, 1, head_dim] float32, to be shared by all layers."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    frequencies = 1.0 / theta**exponents  # [head_dim / 2]
    if scaling is not None:
        frequencies = scaling.stretch(frequencies)
    angles = positions.float()[:, None] * frequencies  # [T, head_dim / 2]
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # [T, 1, head_dim]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, H, head_dim] -> the same shape, turned by the angles of its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)
