"""Ranges of weight groups and the values inside them."""

import pytest
import torch
from torch import Tensor

from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.quantization.methods.autoawq import RangeRule
from omnispeech.quantization.methods.grid import Rule

ASYMMETRIC = Rule(4, 64, symmetric=False)
SYMMETRIC = Rule(4, 64, symmetric=True)
RULES = [ASYMMETRIC, SYMMETRIC, Rule(8, 32, symmetric=True), Rule(4, -1, symmetric=False)]


def weights(rows: int = 24, columns: int = 256) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns) * torch.rand(rows, 1).add(0.1)


def relative(w: Tensor, rounded: Tensor) -> float:
    return float((rounded - w).norm() / w.norm())


@pytest.mark.parametrize("sign", [1, -1])
def test_group_of_one_sign_far_from_zero_is_kept(sign: int) -> None:
    w = sign * torch.linspace(1.0, 1.1, 64).repeat(3, 1)
    assert relative(w, RangeRule(64, symmetric=False).rounded(w)) > 0.85  # AutoAWQ's rule
    assert relative(w, ASYMMETRIC.widest(w).nearest(w)) < 0.03


@pytest.mark.parametrize("rule", RULES)
def test_no_weight_is_further_off_than_half_a_step(rule: Rule) -> None:
    w = weights()
    grid = rule.widest(w)
    steps = (grid.nearest(w) - w).view(*grid.scales.shape, -1).abs() / grid.scales[..., None]
    assert steps.max() < 0.51 if not rule.symmetric else steps.max() < 0.57


@pytest.mark.parametrize("rule", RULES)
def test_stored_weight_means_what_was_judged(rule: Rule) -> None:
    w = weights()
    grid = rule.widest(w)
    assert torch.equal(grid.weight(grid.codes(w)).dequantize(), grid.nearest(w))


def test_zero_stays_zero_in_every_rule() -> None:
    w = weights()
    w[:, ::7] = 0
    for rule in RULES:
        assert (rule.widest(w).nearest(w)[:, ::7] == 0).all()


def test_group_of_zeros_is_exact() -> None:
    w = weights()
    w[3, 64:128] = 0
    grid = ASYMMETRIC.widest(w)
    assert (grid.nearest(w)[3, 64:128] == 0).all()
    assert (grid.scales > 0).all()


def test_symmetric_codes_stand_around_the_middle() -> None:
    assert (SYMMETRIC.widest(weights()).zeros == 8).all()
    assert (Rule(8, 64, symmetric=True).widest(weights()).zeros == 128).all()


def test_small_weights_keep_their_precision() -> None:
    w = weights() * 1e-4
    assert relative(w, ASYMMETRIC.widest(w).nearest(w)) < 0.12


def test_weight_beyond_float16_scales_is_refused() -> None:
    with pytest.raises(CheckpointError, match="scale beyond float16"):
        ASYMMETRIC.widest(weights() * 1e7)


def test_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="group_size 64 does not divide 96 input columns"):
        ASYMMETRIC.widest(torch.randn(4, 96))


def output_error(rule: Rule, error: Tensor, gram: Tensor) -> Tensor:
    """[N, G], summed in the plainest way."""
    size = rule.grouped(error).shape[2]
    parts = [error[:, g : g + size] for g in range(0, error.shape[1], size)]
    blocks = [gram[g : g + size, g : g + size] for g in range(0, error.shape[1], size)]
    pairs = zip(parts, blocks, strict=True)
    return torch.stack([(part @ block * part).sum(1) for part, block in pairs], 1)


@pytest.mark.parametrize("rule", [ASYMMETRIC, SYMMETRIC, Rule(4, 32, symmetric=False)])
def test_narrowed_range_is_never_heard_more_than_the_widest(rule: Rule) -> None:
    w = weights()
    x = torch.randn(512, 256) @ torch.randn(256, 256)
    gram = x.T @ x / 512
    heard = output_error(rule, rule.heard(w, rule.blocks(gram)).nearest(w) - w, gram)
    widest = output_error(rule, rule.widest(w).nearest(w) - w, gram)
    assert (heard <= widest * 1.0001).all()
    assert heard.sum() < 0.9 * widest.sum()


def test_wide_groups_weigh_errors_by_the_diagonal() -> None:
    rule, w = Rule(4, -1, symmetric=False), weights(8, 512)
    energy = torch.rand(512) ** 4
    grid = rule.heard(w, rule.blocks(torch.diag(energy)))
    error = (grid.nearest(w) - w).square() @ energy
    assert error.sum() < ((rule.widest(w).nearest(w) - w).square() @ energy).sum()
