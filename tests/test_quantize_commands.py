"""The three commands as a user starts them, on small random models."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_models import (
    QUICK,
    config,
    quantize,
    quantize_llm,
    tensors,
)

from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.quantization.methods import layer_quantizer
from omnispeech.quantize_cli import calibrate, commands, runs

pytestmark = pytest.mark.usefixtures("no_settings_of_this_machine")

ROOT = Path(__file__).parent.parent


# quantize.py


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--target", "vllm", "--q-group-size", "256"], "group sizes -1, 32, 64, 128"),
        (["--dataset", "nowhere,neither", "--q-group-size", "32"], "not found: nowhere"),
        (["--push-to-hub", "me/too/much"], "USER/NAME"),
        (["--bits", "3"], "allowed: 4, 8"),
    ],
)
def test_what_does_not_go_is_refused_with_the_reason(
    model: Path, flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(model, *flags) == 2
    assert reason in capsys.readouterr().err
    assert not list(model.glob("*-*bit*"))


@pytest.mark.parametrize("place", [".", "OpenS2S"])
def test_the_speech_model_is_sent_to_its_own_command(
    models: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(models / place) == 2
    assert f"quantize_llm_awq.py --models {models}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "name", "method", "bits"),
    [
        (["--gptq"], "GPTQ-8bit", "gptq", 8),
        (["--gptq", "--bits", "4", "--gptq_desc_act"], "GPTQ-4bit", "gptq", 4),
        (["--awq", "--bits", "8"], "AWQ-8bit", "gptq", 8),
        (["--awq", "--compatible"], "AWQ-4bit", "awq", 4),
        (["--version", "GEMV"], "AWQ-4bit", "awq", 4),
    ],
)
def test_the_result_lies_inside_the_source_under_method_and_bits(
    model: Path, text: list[str], flags: list[str], name: str, method: str, bits: int
) -> None:
    assert quantize(model, *text, *flags) == 0
    written = config(model / name)["quantization_config"]
    assert (written["quant_method"], written["bits"]) == (method, bits)
    Manifest(model).check(name, deep=True)


def test_a_dry_run_writes_nothing(
    model: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(model.iterdir())
    assert quantize(model, *text, "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert sorted(model.iterdir()) == before


def test_the_result_is_pushed_when_it_is_finished(
    model: Path, text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[Any] = []

    def push(directory: Path, repo: str, *, private: bool | None) -> str:
        assert (directory / "quantization_report.json").is_file()
        pushed.append((directory, repo, private))
        return "https://hub/me/it"

    monkeypatch.setattr(runs, "push_to_hub", push)
    assert quantize(model, *text, "--push-to-hub", "me/it", "--private") == 0
    assert pushed == [(model / "AWQ-4bit", "me/it", True)]


def test_a_misfit_is_told_before_any_sound_is_heard(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hear(*_: object, **__: object) -> None:
        raise AssertionError("the sound was heard")

    monkeypatch.setattr(calibrate, "speech_calibration", hear)
    assert quantize_llm(models, "--q-group-size", "256") == 2


# stopped and continued


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_what_the_same_command_goes_on_from(
    model: Path,
    text: list[str],
    number: signal.Signals,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert quantize(model, *text, "--output_dir", str(tmp_path / "whole")) == 0
    real = layer_quantizer.LayerQuantizer.quantize
    layers = []
    # a shell starts what runs in its background with SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(self: Any, block: Any, floats: Any, quantized: Any, kept: Any) -> Any:
        layers.append(block)
        if len(layers) == 2:
            os.kill(os.getpid(), number)
        return real(self, block, floats, quantized, kept)

    monkeypatch.setattr(layer_quantizer.LayerQuantizer, "quantize", interrupted)
    result = tmp_path / "result"
    assert quantize(model, *text, "--output_dir", str(result)) == status
    assert "the same command goes on" in capsys.readouterr().err
    assert not result.exists()
    assert quantize(model, *text, "--output_dir", str(result)) == 0
    assert len(layers) == 3  # the first layer was not done again
    whole = tmp_path / "whole"
    assert (result / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# quantize_llm_awq.py


def test_the_llm_is_quantized_in_the_three_steps_of_the_guide(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize_llm(models) == 0
    said = capsys.readouterr().out
    places = [
        said.index(line)
        for line in (
            "AWQ Quantization for OmniSpeech LLM (Persistent on Disk)",
            "Step 1/3: Extracting LLM from OmniSpeech Checkpoint",
            "Standalone LLM checkpoint",
            "Step 2/3: Quantizing LLM with AutoAWQ",
            "LLM quantized to 4-bit",
            "Quantized LLM saved",
            "Step 3/3: Verifying Quantization",
            "Original checkpoint (full): ",
            "Quantized LLM only: ",
            "Compression ratio: ",
            "Quantization successful!",
            "SUCCESS! LLM Quantization Complete",
            "docker restart opens2s-server",
        )
    ]
    assert places == sorted(places)
    assert "calibration tokens: audio" in said
    Manifest(models).check("OpenS2S-llm-awq", deep=True)


def test_figures_are_measured_from_the_files(
    models: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize_llm(models, *text) == 0
    said = capsys.readouterr().out
    full = sum(path.stat().st_size for path in (models / "OpenS2S").glob("*.safetensors"))
    made = (models / "OpenS2S-llm-awq" / "model.safetensors").stat().st_size
    assert f"Original checkpoint (full): {size_text(full)}" in said
    assert f"Quantized LLM only: {size_text(made)}" in said
    assert f"Compression ratio: {full / made:.2f}x" in said
    assert "calibration tokens: text" in said


def test_a_failure_is_no_success(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / "OpenS2S" / "config.json").unlink()
    assert quantize_llm(models) == 2
    said = capsys.readouterr()
    assert "config.json is missing" in said.err and "omnispeech small" in said.err
    assert said.out == ""


def test_the_llm_has_a_directory_for_each_method(models: Path, text: list[str]) -> None:
    assert quantize_llm(models, *text, "--gptq") == 0
    written = config(models / "OpenS2S-llm-gptq")["quantization_config"]
    assert (written["quant_method"], written["bits"]) == ("gptq", 8)
    assert quantize_llm(models, *text, "--bits", "8") == 2


def test_the_speech_lm_is_quantized_on_the_replies_of_the_models(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize_llm(models, "--part", "speech_lm", "--q-group-size", "16") == 2
    flags = ["--part", "speech_lm", "--gptq", "--gptq_group_size", "32"]
    assert quantize_llm(models, *flags) == 2
    assert quantize_llm(models, "--part", "speech_lm", "--q-group-size", "-1") == 0
    assert "--speech-lm awq" in capsys.readouterr().out
    assert "spk2tts.weight" in tensors(models / "OpenS2S-speech-lm-awq")


def test_the_models_directory_comes_from_the_environment_too(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMNISPEECH_MODELS", str(models))
    assert commands.quantize_llm_awq([*QUICK, "--dry-run"]) == 0
    assert str(models) in capsys.readouterr().out


# quantize_model_once.py


def once(models: Path, *flags: str) -> int:
    return commands.quantize_model_once(["--models", str(models), *flags])


def test_the_whole_model_is_written_once_and_then_only_checked(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert once(models) == 0
    said = capsys.readouterr().out
    size = sum(p.stat().st_size for p in (models / "OpenS2S-8bit").rglob("*") if p.is_file())
    assert f"8-bit model: {size_text(size)}" in said and "docker restart" in said
    before = (models / "omnispeech-manifest.json").read_bytes()
    assert once(models) == 0
    assert "checked again" in capsys.readouterr().out
    assert (models / "omnispeech-manifest.json").read_bytes() == before
    shutil.rmtree(models / "OpenS2S")
    assert once(models) == 0


def test_a_damaged_or_foreign_8_bit_model_is_no_success(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert once(models) == 0
    (models / "OpenS2S-8bit" / "tokenizer.json").write_text("{}")
    assert once(models) == 1
    assert "tokenizer.json" in capsys.readouterr().err
    assert once(models, "--overwrite") == 0
    raw = config(models / "OpenS2S")
    (models / "OpenS2S" / "config.json").write_text(json.dumps(raw | {"other": 1}))
    assert once(models) == 2
    assert "another model" in capsys.readouterr().err


# the scripts


@pytest.mark.parametrize("name", ["quantize", "quantize_llm_awq", "quantize_model_once"])
def test_the_scripts_start(name: str) -> None:
    command = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0 and f"usage: {name}.py" in ran.stdout


def test_wrong_flags_are_refused_without_loading_torch() -> None:
    code = (
        "import sys; from omnispeech.quantize_cli.commands import quantize; "
        "status = quantize(['--bits', '5']); sys.exit(10 if 'torch' in sys.modules else status)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 2
