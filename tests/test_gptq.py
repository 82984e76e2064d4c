"""Rounding with error compensation and its refinement, against the plainest ways to do it."""

import pytest
import torch
from torch import Tensor

from omnispeech.quantization.methods import refine as refinement
from omnispeech.quantization.methods.gptq import (
    INVERTED,
    Factor,
    compensate,
    compensate_in_turn,
    factorize,
    groups_in_order,
)
from omnispeech.quantization.methods.grid import SMALLEST_SCALE, Rule
from omnispeech.quantization.methods.refine import refine
from omnispeech.quantization.methods.statistics import output_energy

RULE = Rule(4, 32, symmetric=False)
K = 160  # more columns than are settled at a time, and no multiple of it


def inputs(tokens: int = 2000, width: int = K) -> Tensor:
    torch.manual_seed(0)
    mixed = torch.randn(tokens, 24) @ torch.randn(24, width) + 0.3 * torch.randn(tokens, width)
    return mixed * torch.logspace(0, 1, width)[torch.randperm(width)]


def gram(width: int = K) -> Tensor:
    x = inputs(width=width)
    return x.T @ x / len(x)


def weights(width: int = K) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(40, width)


def factor(matrix: Tensor, *, by_activation: bool = True) -> Factor:
    found = factorize(matrix, by_activation=by_activation, damping=0.01)
    assert found is not None
    return found


def loss(w: Tensor, rounded: Tensor, matrix: Tensor) -> float:
    return float(output_energy(rounded - w, matrix).sum())


def test_factor_is_that_of_the_inverse() -> None:
    matrix = gram()
    found = factor(matrix)
    damped = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(K)
    wanted = torch.linalg.inv(damped[found.order][:, found.order].double())
    torch.testing.assert_close((found.upper.T @ found.upper).double(), wanted, rtol=1e-3, atol=2e-6)
    assert found.upper.tril(-1).abs().max() == 0


@pytest.mark.parametrize("width", [INVERTED, 2 * INVERTED + 3])
def test_factor_of_many_blocks_leaves_the_matrix_alone(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omnispeech.quantization.methods.gptq.CHUNK", 1000)
    matrix = gram(width)
    before = matrix.clone()
    found = factor(matrix, by_activation=False).upper.double()
    assert torch.equal(matrix, before)
    damped = (matrix + 0.01 * matrix.diagonal().mean() * torch.eye(width)).double()
    assert (found @ damped @ found.T - torch.eye(width)).abs().max() < 1e-3


def test_activation_order_falls() -> None:
    matrix = gram()
    assert (matrix.diagonal()[factor(matrix).order].diff() <= 0).all()
    assert torch.equal(factor(matrix, by_activation=False).order, torch.arange(K))


@pytest.mark.parametrize("by_activation", [True, False])
def test_blocks_give_what_single_columns_give(by_activation: bool) -> None:
    matrix, w = gram(), weights()
    grid, found = RULE.widest(w), factor(matrix, by_activation=by_activation)
    left, wanted = w.double().clone(), torch.zeros(w.shape)
    inverse = torch.linalg.inv(
        matrix.double() + 0.01 * float(matrix.diagonal().mean()) * torch.eye(K)
    )
    rest = found.order.tolist()
    while rest:  # the textbook: the inverse of what is left, column after column
        k = rest[0]
        scale, zero = grid.scales[:, k // 32].double(), grid.zeros[:, k // 32].double()
        wanted[:, k] = code = ((left[:, k] / scale).round() + zero).clamp(0, 15)
        error = (left[:, k] - (code - zero) * scale) / inverse[k, k]
        left -= error[:, None] * inverse[k]
        inverse -= torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        rest.pop(0)
    same = compensate(w, found, grid) == wanted
    assert same.float().mean() > 0.999


@pytest.mark.parametrize("by_activation", [True, False])
def test_compensation_is_heard_less_than_plain_rounding(by_activation: bool) -> None:
    matrix, w = gram(), weights()
    grid = RULE.widest(w)
    codes = compensate(w, factor(matrix, by_activation=by_activation), grid)
    compensated = loss(w, grid.weight(codes).dequantize(), matrix)
    assert compensated < 0.4 * loss(w, grid.nearest(w), matrix)


def test_order_changes_codes_but_not_shapes() -> None:
    matrix, w = gram(), weights()
    grid = RULE.widest(w)
    first = compensate(w, factor(matrix), grid)
    second = compensate(w, factor(matrix, by_activation=False), grid)
    assert first.shape == second.shape == w.shape
    assert not torch.equal(first, second)


@pytest.mark.parametrize("group_size", [32, 256, -1])
def test_groups_in_turn_are_runs_in_the_order_of_processing(group_size: int) -> None:
    matrix, w = gram(512), weights(512)
    rule = Rule(4, group_size, symmetric=True)
    found = factor(matrix)
    codes, grid = compensate_in_turn(w, found, rule)
    width = 512 // grid.scales.shape[1]
    group_of = groups_in_order(found.order, width)
    assert group_of is not None and group_of.bincount().tolist() == [width] * (512 // width)
    assert (group_of[found.order].diff() >= 0).all()
    rounded = grid.weight(codes, group_of).dequantize()
    assert loss(w, rounded, matrix) < 0.4 * loss(w, rule.widest(w).nearest(w), matrix)


def test_natural_order_needs_no_group_index() -> None:
    assert groups_in_order(torch.arange(64), 32) is None


def test_silent_channel_is_rounded_to_nearest_and_disturbs_nothing() -> None:
    matrix, w = gram(), weights()
    matrix[5], matrix[:, 5] = 0, 0
    grid = RULE.widest(w)
    codes = compensate(w, factor(matrix), grid)
    assert torch.equal(codes[:, 5], grid.codes(w)[:, 5])


def test_fewer_tokens_than_channels_are_enough() -> None:
    x = inputs(tokens=20)
    w = weights()
    codes = compensate(w, factor(x.T @ x / 20), RULE.widest(w))
    assert codes.shape == w.shape


def test_damping_is_raised_until_the_matrix_is_definite() -> None:
    matrix = gram()
    matrix -= 0.05 * matrix.diagonal().mean() * torch.eye(K)
    assert factor(matrix).damping == pytest.approx(0.1)


def test_hopeless_matrix_has_no_factor() -> None:
    assert factorize(-torch.eye(8), by_activation=False, damping=0.01) is None


@pytest.mark.parametrize("in_turn", [True, False])
def test_refinement_never_raises_the_loss(in_turn: bool) -> None:
    matrix, w = gram(), weights()
    group_of = torch.arange(K) // 32
    grid = RULE.widest(w)
    codes = compensate(w, factor(matrix), grid)
    if in_turn:
        found = factor(matrix)
        codes, grid = compensate_in_turn(w, found, RULE)
        known = groups_in_order(found.order, 32)
        assert known is not None
        group_of = known.long()
    better = refine(w, matrix, codes, grid, group_of=group_of, passes=6)
    assert all(b <= a for a, b in zip(better.losses, better.losses[1:], strict=False))
    assert better.losses[-1] < 0.95 * better.losses[0]
    rounded = better.grid.weight(better.codes, group_of.int()).dequantize()
    assert loss(w, rounded, matrix) == pytest.approx(better.losses[-1], rel=1e-3)


def test_refinement_stops_when_little_is_won(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, w = gram(), weights()
    grid = RULE.widest(w)
    codes = compensate(w, factor(matrix), grid)
    group_of = torch.arange(K) // 32
    all_passes = refine(w, matrix, codes, grid, group_of=group_of, passes=100)
    assert 3 < len(all_passes.losses) < 30
    monkeypatch.setattr("omnispeech.quantization.methods.refine.ENOUGH", 0.5)
    assert len(refine(w, matrix, codes, grid, group_of=group_of, passes=100).losses) == 2


def test_second_look_at_codes_is_coordinate_descent() -> None:
    matrix, w = gram(), weights()
    grid, group_of = RULE.widest(w), torch.arange(K) // 32
    value = grid.nearest(w).double()
    wanted = torch.zeros(w.shape)
    for k in range(K):  # each code to its best value while the others stay
        scale, zero = grid.scales[:, k // 32].double(), grid.zeros[:, k // 32].double()
        best = value[:, k] + (w - value) @ matrix.double()[k] / matrix.double()[k, k]
        wanted[:, k] = code = ((best / scale).round() + zero).clamp(0, 15)
        value[:, k] = (code - zero) * scale
    codes = refinement._round_again(w, matrix, grid.nearest(w), grid, group_of)
    assert (codes == wanted).float().mean() > 0.999


def test_row_keeps_its_scales_where_new_ones_would_be_too_small() -> None:
    matrix, w = gram(), weights() * 4e-6
    grid, group_of = RULE.widest(w), torch.arange(K) // 32
    steps = grid.codes(w).float() - grid.zeros[:, group_of]
    scales = refinement._refit(w, matrix, steps, grid.scales, group_of)
    assert 0 < (scales == grid.scales).all(1).sum() < len(w)
    before = output_energy(steps * grid.scales[:, group_of] - w, matrix)
    after = output_energy(steps * scales[:, group_of] - w, matrix)
    assert (after <= before * 1.0001).all() and scales.min() >= SMALLEST_SCALE


def test_pass_that_makes_it_worse_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, w = gram(), weights()
    grid = RULE.widest(w)
    monkeypatch.setattr(
        refinement, "_pass", lambda w, gram, codes, grid, group_of: (codes * 0, grid.scales)
    )
    kept = refine(w, matrix, grid.codes(w), grid, group_of=torch.arange(K) // 32, passes=5)
    assert torch.equal(kept.codes, grid.codes(w))
    assert len(kept.losses) == 1
