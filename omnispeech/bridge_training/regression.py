"""The best linear map from windows of WavLM frames to encoder frames, from sums alone.

Convolution and projection have nothing between them: together they are one linear map of a window
of frames. What fits it best is known in closed form from sums of products, which take the same
room for a minute of audio and for a thousand hours: least squares with a ridge, cut to the rank
that the convolution lets through (reduced-rank regression), then factored into the two layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGES = tuple(10.0**power for power in range(-6, 2))  # in units of the variance of a column


def windows(features: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """[T, C] -> [T', C * K]: what a convolution sees at each place; beyond the ends are zeros.

    In the order of a convolution's weight [D, C, K], flattened.
    """
    padded = F.pad(features.T, (padding, padding))  # [C, T + 2 * padding]
    return padded.unfold(1, kernel, stride).transpose(0, 1).flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Of inputs x and targets y over frames: float64, on the host."""

    frames: Tensor  # []
    x: Tensor  # [K]
    y: Tensor  # [N]
    xx: Tensor  # [K, K]
    xy: Tensor  # [K, N]
    yy: Tensor  # [] of squares

    @classmethod
    def zero(cls, inputs: int, outputs: int) -> "Sums":
        shapes = [(), (inputs,), (outputs,), (inputs, inputs), (inputs, outputs), ()]
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def add(self, x: Tensor, y: Tensor) -> None:
        """[T, K] and [T, N], in place."""
        x, y = x.to("cpu", torch.float64), y.to("cpu", torch.float64)
        self.frames.add_(len(x))
        self.x.add_(x.sum(0))
        self.y.add_(y.sum(0))
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy.add_(y.square().sum())

    def __add__(self, other: "Sums") -> "Sums":
        pairs = zip(self.tensors().values(), other.tensors().values(), strict=True)
        return Sums(*(mine + others for mine, others in pairs))


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """y = (x - x_mean) @ reduce @ expand + y_mean"""

    x_mean: Tensor  # [K]
    y_mean: Tensor  # [N]
    reduce: Tensor  # [K, R]
    expand: Tensor  # [R, N], rows orthonormal
    ridge: float

    def squared_error(self, sums: Sums) -> float:
        """Summed over the frames that `sums` are of, which need not be those of the fit."""
        gram, cross, squares = _centered(sums, self.x_mean, self.y_mean)
        within = (self.reduce * (cross @ self.expand.T)).sum()
        # expand is orthonormal: the length of a prediction is that of what it is made of
        return float(squares - 2 * within + (self.reduce * (gram @ self.reduce)).sum())


class Fit:
    """All ridges from one decomposition."""

    def __init__(self, sums: Sums, rank: int) -> None:
        """rank: what the map is cut to; less where it cannot be as high."""
        count = sums.frames
        self._rank = min(rank, *sums.xy.shape)
        self._x_mean, self._y_mean = sums.x / count, sums.y / count
        gram, cross, _ = _centered(sums, self._x_mean, self._y_mean)
        spread = (gram.diagonal() / count).clamp(min=0).sqrt()  # [K]
        # a column that never changes tells nothing, and gets no weight
        self._scale = torch.where(spread > 0, 1 / spread, torch.zeros_like(spread))
        values, self._vectors = torch.linalg.eigh(gram * self._scale[:, None] * self._scale / count)
        self._values = values.clamp(min=0)
        self._cross = self._vectors.T @ (cross * self._scale[:, None] / count)  # [K, N]

    def map(self, ridge: float) -> LinearMap:
        """ridge: added to the variance of every column, in units of that variance."""
        solved = self._cross / (self._values + ridge)[:, None]
        _, directions = torch.linalg.eigh(self._cross.T @ solved)  # [N, N], ascending
        expand = directions[:, -self._rank :].flip(1).T  # [R, N]
        reduce = self._scale[:, None] * (self._vectors @ (solved @ expand.T))
        return LinearMap(self._x_mean, self._y_mean, reduce, expand, ridge)


def choose_ridge(fit: Fit, validation: Sums, ridges: Sequence[float] = RIDGES) -> float:
    """That with the smallest error on audio the fit has not seen."""
    return min(ridges, key=lambda ridge: fit.map(ridge).squared_error(validation))


def _centered(sums: Sums, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of (x - x_mean)(x - x_mean), (x - x_mean)(y - y_mean) and (y - y_mean) squared."""
    gram = sums.xx - torch.outer(x, sums.x) - torch.outer(sums.x, x)
    cross = sums.xy - torch.outer(x, sums.y) - torch.outer(sums.x, y)
    squares = sums.yy - 2 * (y @ sums.y) + sums.frames * (y @ y)
    return (
        gram + sums.frames * torch.outer(x, x),
        cross + sums.frames * torch.outer(x, y),
        squares,
    )
