"""What the default method is better at, on a trained model; `bench.py quantize` has the figures."""

from pathlib import Path

import pytest
import torch
from quality_models import EFFORT, held_out, judged, kl, model_with
from torch import Tensor

from benchmarks.byte_lm import write_model
from benchmarks.corpus import pieces
from benchmarks.divergence import divergence
from benchmarks.quality import LENGTH, METHODS
from omnispeech.calibration.samples import text_calibration
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.quantized import load_causal_lm
from omnispeech.quantization.pipeline import run
from omnispeech.quantization.run_settings import RunSettings

OUTLIERS = ("none", "moderate", "strong")


@pytest.mark.parametrize("outliers", OUTLIERS[1:])
def test_outliers_do_not_change_what_the_model_computes(outliers) -> None:
    exact, other = held_out("none"), held_out(outliers)
    assert divergence(exact.exact, other.exact, exact.targets, exact.counted).kl < 1e-9


def test_outliers_are_hard_for_plain_rounding() -> None:
    """Else the tests below prove nothing."""
    assert kl("plain rounding", "moderate") > 3 * kl("plain rounding", "none")


def test_the_default_halves_the_divergence_of_the_autoawq_recipe() -> None:
    assert kl("default", "moderate") < 0.5 * kl("AutoAWQ recipe", "moderate")


@pytest.mark.parametrize("outliers", OUTLIERS)
def test_the_default_is_better_than_plain_rounding(outliers) -> None:
    assert kl("default", outliers) < 0.5 * kl("plain rounding", outliers)


def test_strong_outliers_cost_the_default_next_to_nothing() -> None:
    assert kl("default", "strong") < 1.5 * kl("default", "none")


@pytest.mark.parametrize("outliers", OUTLIERS)
def test_no_module_group_is_worse_than_plain_rounding(outliers) -> None:
    result = judged("default", outliers)
    assert result.groups == 12
    assert result.worse_groups == 0


@pytest.mark.parametrize("outliers", OUTLIERS)
def test_nothing_is_better_than_the_float_model_but_by_chance(outliers) -> None:
    assert judged("default", outliers).divergence.perplexity_change > -0.02


def test_the_files_are_as_good_as_what_was_judged_in_memory(tmp_path: Path) -> None:
    write_model(model_with("moderate"), tmp_path / "source", torch.float16)
    source = LanguageFiles.open(tmp_path / "source")
    ids = pieces("calibration", EFFORT.calibration, LENGTH, 0)
    heard = text_calibration(source, ids.tolist(), seq_len=LENGTH, max_tokens=ids.numel())
    run(source, heard, METHODS["default"], RunSettings(), tmp_path / "quantized")
    exact = held_out("moderate")
    logits = logits_of(tmp_path / "quantized", exact.vectors)
    stored = divergence(exact.exact, logits, exact.targets, exact.counted).kl
    # states are kept in float16 between layers there, so that codes are not the same
    assert stored == pytest.approx(kl("default", "moderate"), rel=0.2)


@torch.inference_mode()
def logits_of(directory: Path, vectors: Tensor) -> Tensor:
    """[B, T, D] -> [B, T, V], as the server loads and runs it."""
    model = load_causal_lm(directory, torch.device("cpu"), torch.float32, kernel="reference")
    rows = []
    for sequence in vectors:
        cache = model.new_cache(len(sequence))
        row = cache.allocate(len(sequence))
        assert row is not None
        rows.append(model.lm_head(model(sequence, cache, cache.layout([(row, len(sequence))]))))
    return torch.stack(rows)
