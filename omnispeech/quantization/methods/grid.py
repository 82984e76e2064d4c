"""Ranges of weight groups, and the 4 or 8 bit values inside them (spec: quantization 2.1, 3.2c)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.layers.packing import QuantizedWeight

SMALLEST_SCALE = 2.0**-20  # below, float16 has less than four significant bits
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
SIDE_SHRINKS = (0.95, 0.9, 0.85, 0.8)
WIDEST_BLOCK = 256
CHUNK = 1 << 20  # weights at a time: temporaries stay in the cache
FEWEST_ROWS = 256  # at a time: fewer would wait for the Gram matrix they are multiplied by


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The values that weights may take: (code - zero) * scale of their row and group."""

    scales: Tensor  # [N, G] float32, every value is one of float16
    zeros: Tensor  # [N, G] float32, whole numbers
    bits: int

    def codes(self, w: Tensor) -> Tensor:
        """[N, K] -> [N, K] uint8, nearest values, half to even."""
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        start = 0
        for rows in few_rows(w):
            part = self.rows(slice(start, start + len(rows)))
            grouped = rows.view(*part.scales.shape, -1)
            codes[start : start + len(rows)] = part._codes(grouped).view_as(rows)
            start += len(rows)
        return codes

    def nearest(self, w: Tensor) -> Tensor:
        """[N, K] -> [N, K], each weight replaced by the nearest value."""
        grouped = w.view(*self.scales.shape, -1)
        codes = self._codes(grouped)
        return codes.sub_(self.zeros[..., None]).mul_(self.scales[..., None]).view_as(w)

    def _codes(self, grouped: Tensor) -> Tensor:
        codes = (grouped / self.scales[..., None]).round_().add_(self.zeros[..., None])
        return codes.clamp_(0, 2**self.bits - 1)

    def weight(self, codes: Tensor, group_of: Tensor | None = None) -> QuantizedWeight:
        """codes: [N, K]"""
        return QuantizedWeight(
            codes=codes.to(torch.uint8),
            zeros=self.zeros.to(torch.uint8),
            scales=self.scales.to(torch.float16),
            bits=self.bits,
            group_of=group_of,
        )

    def where(self, rows: Tensor, other: "Grid") -> "Grid":
        """This grid in the rows [N] that are true, the other one elsewhere."""
        scales = torch.where(rows[:, None], self.scales, other.scales)
        return Grid(scales, torch.where(rows[:, None], self.zeros, other.zeros), self.bits)

    def rows(self, rows: slice) -> "Grid":
        return Grid(self.scales[rows], self.zeros[rows], self.bits)


@dataclass(frozen=True, slots=True)
class Rule:
    """How a group's range becomes a grid. Scales are rounded before zeros and codes are taken."""

    bits: int
    group_size: int  # -1: the whole row
    symmetric: bool

    def grouped(self, w: Tensor) -> Tensor:
        """[N, K] -> [N, G, g]; ConfigError if K is no multiple of the group size."""
        size = w.shape[1] if self.group_size == -1 else self.group_size
        if w.shape[1] % size:
            raise ConfigError(
                f"group_size {size} does not divide {w.shape[1]} input columns; "
                "take a smaller one or -1"
            )
        return w.view(w.shape[0], -1, size)

    def between(self, low: Tensor, high: Tensor) -> Grid:
        """low <= 0 <= high: [N, G]"""
        top = 2**self.bits - 1
        half = 2 ** (self.bits - 1)
        step = (
            torch.maximum(high / (half - 1), -low / half) if self.symmetric else (high - low) / top
        )
        scales = step.clamp_min(SMALLEST_SCALE).half().float()
        if not scales.isfinite().all():
            raise CheckpointError(
                f"a weight of {max(high.max(), -low.min()):.3g} needs a scale beyond float16"
            )
        if self.symmetric:
            return Grid(scales, torch.full_like(scales, half), self.bits)
        return Grid(scales, (-low / scales).round_().clamp_(0, top), self.bits)

    def widest(self, w: Tensor) -> Grid:
        """Every weight [N, K] is inside its range, and so is zero."""
        low, high = _range(self.grouped(w))
        return self.between(low, high)

    def blocks(self, gram: Tensor) -> Tensor:
        """[K, K] -> [G, g, g], what the columns of a group have to do with each other.

        Of groups that are too wide for that only the diagonal is kept: [G, g].
        """
        if self.grouped(gram).shape[2] > WIDEST_BLOCK:
            return self.grouped(gram.diagonal()[None])[0]
        size = self.grouped(gram).shape[2]
        square = gram.view(len(gram) // size, size, len(gram) // size, size)
        return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    def heard(self, w: Tensor, blocks: Tensor) -> Grid:
        """The range that disturbs the group's part of the output least; its ends shrink one by one.

        w: [N, K], blocks: of the Gram matrix of the inputs.
        """
        step = max(1, CHUNK // w.shape[1])
        return joined([self._heard(self.grouped(rows), blocks) for rows in torch.split(w, step)])

    def _heard(self, w: Tensor, blocks: Tensor) -> Grid:
        low, high = _range(w)
        best = torch.full_like(low, torch.inf)
        factors = torch.ones_like(low), torch.ones_like(high)
        trials = [(p, p) for p in SHRINKS]
        if not self.symmetric:
            trials += [(p, 1.0) for p in SIDE_SHRINKS] + [(1.0, p) for p in SIDE_SHRINKS]
        for i, (a, b) in enumerate(trials):
            if i in (len(SHRINKS), len(SHRINKS) + len(SIDE_SHRINKS)):
                low, high = low * factors[0], high * factors[1]
                factors = torch.ones_like(low), torch.ones_like(high)
            grid = self.between(low * a, high * b)
            error = _output_error(grid.nearest(w.flatten(1)).view_as(w).sub_(w), blocks)
            better = error < best
            best = torch.where(better, error, best)
            factors = (
                torch.where(better, a, factors[0]),
                torch.where(better, b, factors[1]),
            )
        return self.between(low * factors[0], high * factors[1])


def few_rows(w: Tensor) -> tuple[Tensor, ...]:
    """Views of all rows of w [N, ...], so many at a time that their temporaries are small."""
    return torch.split(w, max(FEWEST_ROWS, CHUNK // w[0].numel()))


def joined(parts: Sequence[Grid]) -> Grid:
    """The grid of some rows below that of others."""
    scales = torch.cat([grid.scales for grid in parts])
    return Grid(scales, torch.cat([grid.zeros for grid in parts]), parts[0].bits)


def _output_error(error: Tensor, blocks: Tensor) -> Tensor:
    """[N, G, g] -> [N, G], mean square of each group's part of the output."""
    if blocks.dim() == 2:
        return error.square_().mul_(blocks).sum(-1)
    return (torch.einsum("ngi,gij->ngj", error, blocks)).mul_(error).sum(-1)


def _range(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """[N, G, g] -> two of [N, G]; a range without zero would make its zero point unreachable."""
    return grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
