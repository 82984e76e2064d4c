"""Rounding with error compensation: what one column loses, later ones make good (spec:
quantization 2.10)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from omnispeech.quantization.methods.grid import CHUNK, Grid, Rule

BLOCK = 128  # columns that are settled before the rest hears of their errors
DAMPING_RAISES = 4
INVERTED = 256  # rows of a triangular matrix at a time


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """How the error of each column is spread: the upper Cholesky factor of the inverse Gram."""

    upper: Tensor  # [K, K] in the order of processing
    order: Tensor  # [K] column that is taken at each step
    damping: float  # what was needed to make the matrix definite


def factorize(gram: Tensor, *, by_activation: bool, damping: float) -> Factor | None:
    """gram: [K, K], untouched; None if no damping makes it definite.

    Beside it lives one matrix of its size, the factor itself.
    """
    energy = gram.diagonal()
    order = torch.arange(len(gram), device=gram.device)
    if by_activation:
        order = energy.argsort(descending=True, stable=True)
    for _ in range(DAMPING_RAISES):
        upper = _inverse_factor(gram, order, damping * float(energy.mean()))
        if upper is not None:
            return Factor(upper, order, damping)
        damping *= 10
    return None


def _inverse_factor(gram: Tensor, order: Tensor, ridge: float) -> Tensor | None:
    # If the reversed matrix is M M^T, the reversed inverse of M is the factor that is wanted:
    # one decomposition in place of two, no inverse of the matrix itself, and each step in place.
    back = order.flip(0)
    matrix = gram[back[:, None], back[None]]
    diagonal = matrix.diagonal()
    diagonal += ridge
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    # in its transpose lie columns one after another, which the decomposition would copy it for
    torch.linalg.cholesky_ex(matrix.T, upper=True, out=(matrix.T, info))
    if int(info) or not diagonal.isfinite().all():
        return None
    _invert_lower(matrix)
    _turn_round(matrix)
    return matrix


def _invert_lower(matrix: Tensor) -> None:
    """In place; [K, K] with zeros above the diagonal."""
    for start in reversed(range(0, len(matrix), INVERTED)):
        stop = min(start + INVERTED, len(matrix))
        square = matrix[start:stop, start:stop]
        one = torch.eye(stop - start, device=matrix.device)
        square.copy_(torch.linalg.solve_triangular(square, one, upper=False))
        below = matrix[stop:, start:stop]
        below.copy_((matrix[stop:, stop:] @ below).neg_() @ square)


def _turn_round(matrix: Tensor) -> None:
    """Rows and columns from last to first, in place."""
    flat = matrix.view(-1)
    for start in range(0, len(flat) // 2, CHUNK):
        stop = min(start + CHUNK, len(flat) // 2)
        front, rear = flat[start:stop], flat[len(flat) - stop : len(flat) - start]
        kept = front.flip(0)
        front.copy_(rear.flip(0))
        rear.copy_(kept)


def compensate(w: Tensor, factor: Factor, grid: Grid) -> Tensor:
    """Codes [N, K] uint8 of weights [N, K] on a grid that was fixed before."""
    width = w.shape[1] // grid.scales.shape[1]
    groups = (factor.order // width).tolist()
    scales, zeros = grid.scales.T.contiguous(), grid.zeros.T.contiguous()  # [G, N]

    def column(step: int, _: Tensor) -> tuple[Tensor, Tensor]:
        return scales[groups[step]], zeros[groups[step]]

    return _sweep(w, factor, column, grid.bits)


def compensate_in_turn(w: Tensor, factor: Factor, rule: Rule) -> tuple[Tensor, Grid]:
    """Codes [N, K] of weights [N, K], and the grid of each run of columns, fitted on reaching it.

    Groups are runs in the order of processing.
    """
    width = rule.grouped(w).shape[2]
    grids: list[Grid] = []

    def column(step: int, left: Tensor) -> tuple[Tensor, Tensor]:
        if step % width == 0:
            group = left[step : step + width].T.contiguous()
            grids.append(Rule(rule.bits, -1, rule.symmetric).widest(group))
        return grids[-1].scales[:, 0], grids[-1].zeros[:, 0]

    codes = _sweep(w, factor, column, rule.bits)
    scales = torch.cat([grid.scales for grid in grids], 1)
    return codes, Grid(scales, torch.cat([grid.zeros for grid in grids], 1), rule.bits)


def groups_in_order(order: Tensor, width: int) -> Tensor | None:
    """[K] int32, the group of each column; None where groups are neighbours anyway."""
    steps = torch.arange(len(order), device=order.device)
    if torch.equal(order, steps):
        return None
    group_of = torch.empty_like(order)
    group_of[order] = steps // width
    return group_of.int()


def _sweep(
    w: Tensor,
    factor: Factor,
    column: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    bits: int,
) -> Tensor:
    """column(step, weights left [K, N]) -> scale and zero [N]. Returns codes [N, K]."""
    upper, top = factor.upper, 2**bits - 1
    left = w.T[factor.order]  # [K, N] in the order of processing
    codes = torch.empty(left.shape, dtype=torch.uint8, device=w.device)  # [K, N], neighbours
    diagonal, columns = upper.diagonal().tolist(), factor.order.tolist()
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for i in range(start, stop):
            scale, zero = column(i, left)
            code = (left[i] / scale).round_().add_(zero).clamp_(0, top)
            codes[columns[i]] = code
            errors[i - start] = left[i].sub(code.sub_(zero).mul_(scale)).div_(diagonal[i])
            left[i + 1 : stop].addr_(upper[i, i + 1 : stop], errors[i - start], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    del left
    return codes.T.contiguous()
