"""What the quantizing commands refuse or survive before, and beside, the work itself."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_models import QUICK, quantize, quantize_llm

from omnispeech.checkpoint.manifest import Manifest
from omnispeech.errors import ConfigError
from omnispeech.quantization.methods.layer_quantizer import LayerQuantizer
from omnispeech.quantize_cli import calibrate, commands, room, runs
from omnispeech.quantize_cli.streams import open_streams, say

pytestmark = pytest.mark.usefixtures("no_settings_of_this_machine")


def never(*_: object, **__: object) -> Any:
    raise AssertionError("the models were asked")


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("speech_calibration", "speech_lm_calibration", "load_sources"):
        monkeypatch.setattr(calibrate, name, never)


@pytest.mark.parametrize("part", ["llm", "speech_lm"])
def test_a_dry_run_listens_to_nothing_and_says_that_numbers_are_bounds(
    models: Path, deaf: None, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize_llm(models, "--part", part, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "calibration: 256 tokens" in said and "upper bounds" in said


def test_what_cannot_fit_is_refused_before_anything_is_heard(
    models: Path, deaf: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize_llm(models, "--max-tokens", str(10**12)) == 2
    assert "not enough room" in capsys.readouterr().err
    assert not list(models.glob("*.partial"))


@pytest.mark.parametrize(
    ("part", "what"), [("llm", "the audio encoder"), ("speech_lm", "all models")]
)
def test_models_that_listen_must_fit_before_they_are_loaded(
    models: Path,
    deaf: None,
    part: str,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(room, "free_memory", lambda _: 1000)
    assert quantize_llm(models, "--part", part) == 2
    said = capsys.readouterr().err
    assert what in said and "1.0 kB are free; free some" in said


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="GB of memory"):
        room.require_room("they", 1 << 62, torch.device("cpu"))


def test_the_peak_of_the_calibration_is_in_the_report(model: Path, text: list[str]) -> None:
    assert quantize(model, *text) == 0
    report = json.loads((model / "AWQ-4bit" / "quantization_report.json").read_text())
    assert report["measured"]["calibration"]


def test_a_model_that_is_not_there_is_named_with_the_command_that_brings_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[Callable[[], int], str]] = [
        (lambda: quantize(tmp_path / "none"), "hf download"),
        (lambda: quantize_llm(tmp_path), f"omnispeech small {tmp_path}"),
        (lambda: commands.quantize_model_once(["--models", str(tmp_path)]), "omnispeech small"),
    ]
    for run, advice in cases:
        assert run() == 2
        said = capsys.readouterr()
        assert "config.json is missing" in said.err and advice in said.err
        assert said.out == "" and not said.err.startswith("\n")


def test_a_quantized_model_is_refused_as_nothing_was_started(
    model: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(model, *text) == 0
    assert quantize(model / "AWQ-4bit", *text) == 2
    assert "quantized" in capsys.readouterr().err


def test_a_stream_that_is_ascii_or_closed_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_stream)
    monkeypatch.setattr(sys, "stderr", None)
    open_streams()
    say("\u2554\u2550")
    sys.stderr.write("swallowed")
    assert ascii_stream.buffer.getvalue() == b"??\n"
    ascii_stream.close()
    open_streams()
    say("swallowed")


def test_a_reader_that_went_away_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    say("one")
    say("two")


def test_an_interruption_says_that_layers_are_kept_only_if_there_is_one(
    model: Path,
    text: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, left = LayerQuantizer.quantize, [0]  # layers before it is interrupted

    def stopped(*given: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(LayerQuantizer, "quantize", stopped)
    assert quantize(model, *text) == 130
    assert "starts over" in capsys.readouterr().err
    left[0] = 1
    assert quantize(model, *text) == 130
    assert "finished layers (1) are kept" in capsys.readouterr().err


def test_an_interruption_before_the_work_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", stop)
    assert commands.quantize([]) == 130
    assert capsys.readouterr().err.startswith("quantize.py: interrupted")


def test_salient_columns_inside_the_result_are_in_the_manifest(
    model: Path, text: list[str]
) -> None:
    flags = [*text, "--max_quality", "--keep-fp-layers", "0", "--iter", "1"]
    assert quantize(model, *flags) == 0
    assert "outlier.json" in Manifest(model).entry("AWQ-4bit-MAX").files
    listed = model / "AWQ-4bit-MAX" / "outlier.json"
    before = listed.stat().st_mtime_ns
    assert quantize(model, *flags) == 0
    assert listed.stat().st_mtime_ns == before


def test_an_8_bit_model_of_unknown_origin_is_called_that(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = ["--models", str(models)]
    assert commands.quantize_model_once(once) == 0
    Manifest(models).enter("OpenS2S-8bit", {"by": "omnispeech verify"})
    assert commands.quantize_model_once(once) == 2
    said = capsys.readouterr().err
    assert "is not known" in said and "another model" not in said


def test_the_default_flags_fit_a_tiny_models_directory(models: Path) -> None:
    flags = ["--models", str(models), "--device", "cpu", "--dry-run"]
    assert "--q-group-size" in QUICK  # which is not among them
    for part in ("llm", "speech_lm"):
        assert commands.quantize_llm_awq([*flags, "--part", part]) == 0


def test_a_run_that_failed_while_it_heard_is_no_refusal(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(calibrate, "speech_calibration", full)
    assert quantize_llm(models) == 1
    assert runs.finished_layers(models / "OpenS2S-llm-awq") == 0
