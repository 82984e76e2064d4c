"""Rotary position embedding with half-split rotation: dimension j is paired with j + D / 2."""

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions: [T] -> cos, sin: [T, 1, head_dim] float32, to be shared by all layers."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)  # [T, head_dim / 2]
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # [T, 1, head_dim]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, H, head_dim] -> the same shape, turned by the angles of its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)
