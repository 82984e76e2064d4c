"""Refinement of codes that are there: scales refitted, then every code looked at once more (spec:
quantization 3.2g)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from omnispeech.quantization.methods.gptq import BLOCK
from omnispeech.quantization.methods.grid import SMALLEST_SCALE, Grid
from omnispeech.quantization.methods.statistics import output_energy

ROWS = 1024  # of a weight at a time
ENOUGH = 1e-3  # a pass that lowers the loss by less is the last


@dataclass(frozen=True, slots=True, eq=False)
class Refined:
    codes: Tensor  # [N, K] uint8
    grid: Grid
    losses: list[float]  # before the first pass and after each; never rises


def refine(
    w: Tensor, gram: Tensor, codes: Tensor, grid: Grid, *, group_of: Tensor, passes: int
) -> Refined:
    """w: [N, K], gram: [K, K], group_of: [K] int64. At most `passes` passes."""
    losses = [_loss(w, gram, codes, grid, group_of)]
    for _ in range(passes):
        parts = [
            _pass(w[rows], gram, codes[rows], grid.rows(rows), group_of)
            for rows in _row_slices(len(w))
        ]
        new_codes = torch.cat([part[0] for part in parts])
        new_grid = Grid(torch.cat([part[1] for part in parts]), grid.zeros, grid.bits)
        loss = _loss(w, gram, new_codes, new_grid, group_of)
        if loss >= losses[-1]:
            break
        codes, grid = new_codes, new_grid
        losses.append(loss)
        if loss > losses[-2] * (1 - ENOUGH):
            break
    return Refined(codes, grid, losses)


def _row_slices(rows: int) -> list[slice]:
    return [slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS)]


def _pass(
    w: Tensor, gram: Tensor, codes: Tensor, grid: Grid, group_of: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and scales [N, G]."""
    steps = codes.float() - grid.zeros[:, group_of]  # [N, K]
    scales = _refit(w, gram, steps, grid.scales, group_of)
    grid = Grid(scales, grid.zeros, grid.bits)
    return _round_again(w, gram, steps.mul_(scales[:, group_of]), grid, group_of), scales


def _refit(w: Tensor, gram: Tensor, steps: Tensor, scales: Tensor, group_of: Tensor) -> Tensor:
    """Least squares scales [N, G] for fixed codes; a row keeps its own where rounding spoils it."""
    rows, groups = scales.shape
    normal = w.new_zeros(rows, groups, groups)
    right = w.new_zeros(rows, groups)
    for g in range(groups):
        members = (group_of == g).nonzero()[:, 0]
        heard = steps[:, members] @ gram[members]  # [N, K]
        right[:, g] = (heard * w).sum(1)
        normal[:, g].index_add_(1, group_of, heard.mul_(steps))
    ridge = normal.diagonal(dim1=1, dim2=2).mean(1).mul(1e-6).clamp_min(1e-30)  # [N]
    definite = normal + torch.diag_embed(ridge[:, None].expand(-1, groups))
    found, info = torch.linalg.solve_ex(definite, right)
    found = found.half().float()

    def cost(s: Tensor) -> Tensor:
        return ((normal @ s[..., None])[..., 0] * s).sum(1) - 2 * (right * s).sum(1)

    good = (found >= SMALLEST_SCALE).all(1) & found.isfinite().all(1) & (info == 0)
    good &= cost(found) < cost(scales)
    return torch.where(good[:, None], found, scales)


def _round_again(w: Tensor, gram: Tensor, value: Tensor, grid: Grid, group_of: Tensor) -> Tensor:
    """One sweep of coordinate descent from the values [N, K]; returns codes [N, K] uint8."""
    top = 2**grid.bits - 1
    energy = gram.diagonal().tolist()
    groups = group_of.tolist()
    scales, zeros = grid.scales.T.contiguous(), grid.zeros.T.contiguous()  # [G, N]
    value = value.T.contiguous()  # [K, N]
    slope = gram @ (w.T - value)  # [K, N], minus half the gradient
    codes = torch.empty(value.shape, dtype=torch.uint8, device=w.device)
    for start in range(0, len(value), BLOCK):
        stop = min(start + BLOCK, len(value))
        moves = torch.empty_like(value[start:stop])
        for i in range(start, stop):
            scale, zero = scales[groups[i]], zeros[groups[i]]
            wish = value[i] + slope[i] / energy[i] if energy[i] > 0 else value[i]
            code = (wish / scale).round_().add_(zero).clamp_(0, top)
            codes[i] = code
            moves[i - start] = code.sub_(zero).mul_(scale).sub_(value[i])
            slope[i + 1 : stop].addr_(gram[i + 1 : stop, i], moves[i - start], alpha=-1)
        slope[stop:].addmm_(gram[stop:, start:stop], moves, alpha=-1)
    return codes.T.contiguous()


def _loss(w: Tensor, gram: Tensor, codes: Tensor, grid: Grid, group_of: Tensor) -> float:
    total = 0.0
    for rows in _row_slices(len(w)):
        part = grid.rows(rows)
        value = (codes[rows].float() - part.zeros[:, group_of]).mul_(part.scales[:, group_of])
        total += float(output_energy(value.sub_(w[rows]), gram).sum())
    return total
