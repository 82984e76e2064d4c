"""The seven defects of the script that the guides were written for (spec: quantization 5.3)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_models import chosen, config, quantize, tensors
from safetensors.torch import load_file

from omnispeech.quantization.methods import layer_quantizer
from omnispeech.quantize_cli import commands

pytestmark = pytest.mark.usefixtures("no_settings_of_this_machine")


def test_defect_1_quant_config_is_a_flag_and_is_merged_with_the_defaults(
    model: Path, text: list[str]
) -> None:
    flags = ["--quant_config", '{"zero_point": false, "version": "GEMM"}']
    assert quantize(model, *text, *flags) == 0
    written = config(model / "AWQ-4bit")["quantization_config"]
    assert (written["group_size"], written["version"]) == (32, "gemm")
    zeros = tensors(model / "AWQ-4bit")["model.layers.0.mlp.up_proj.qzeros"]
    assert (zeros == -0x77777778).all()  # 8 in every nibble: symmetric, and readable by servers
    assert written["zero_point"] is True


def test_defect_2_quality_knobs_do_not_end_up_in_the_files_of_others(
    model: Path, text: list[str]
) -> None:
    knobs = ["--keep-fp-layers", "-1", "--iter", "2", "--search-step", "2", "--desc-act"]
    assert quantize(model, *text, *knobs) == 0
    written = config(model / "AWQ-4bit")["quantization_config"]
    names = {"quant_method", "zero_point", "group_size", "bits", "version"}
    assert written.keys() == names | {"modules_to_not_convert"}
    kept = written["modules_to_not_convert"]
    assert len(kept) == 7 and all(name.startswith("model.layers.1.") for name in kept)


def test_defect_2_a_key_that_is_not_known_is_refused_with_those_that_are(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(model, "--quant_config", '{"w_bits": 4}') == 2
    said = capsys.readouterr().err
    assert "unknown key 'w_bits'" in said and "w_bit," in said and "q_group_size" in said


def test_defect_3_max_quality_runs_and_has_a_directory_of_its_own(
    model: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max_quality", "--keep-fp-layers", "0", "--iter", "3"]
    assert quantize(model, *text, *flags) == 0
    result = model / "AWQ-4bit-MAX"
    report = json.loads((result / "quantization_report.json").read_text())
    assert report["settings"]["method"]["search_step"] == 2
    assert report["settings"]["method"]["passes"] == 3
    listed = json.loads((result / "outlier.json").read_text())
    assert "model.layers.1.mlp.down_proj" in listed
    assert "layer 0 stays float, refined up to 3 times" in capsys.readouterr().out
    assert not (model / "AWQ-4bit").exists()


def test_defect_4_the_new_config_is_not_overwritten_by_that_of_the_source(
    model: Path, text: list[str]
) -> None:
    assert quantize(model, *text) == 0
    written = config(model / "AWQ-4bit")
    assert written["quantization_config"]["quant_method"] == "awq"
    assert written["hidden_size"] == config(model)["hidden_size"]
    assert "quantization_config" not in config(model)
    assert (model / "AWQ-4bit" / "custom.py").is_file()
    assert (model / "AWQ-4bit" / "tokenizer.json").is_file()


def test_defect_5_a_directory_in_the_way_is_no_success(
    model: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "AWQ-4bit").mkdir()
    (model / "AWQ-4bit" / "model.safetensors").write_bytes(b"half")
    assert quantize(model, *text) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert quantize(model, *text, "--overwrite") == 0
    assert quantize(model, *text) == 0
    assert "Found complete, checked again" in capsys.readouterr().out
    assert quantize(model, *text, "--search-step", "2") == 2  # other settings
    weights = bytearray((model / "AWQ-4bit" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "AWQ-4bit" / "model.safetensors").write_bytes(weights)
    assert quantize(model, *text) == 1  # damaged


SPELLINGS = (
    "--model_path",
    "--force_cpu",
    "--batch_size",
    "--seq_len",
    "--quant_config",
    "--output_dir",
    "--max_quality",
    "--gptq_dataset",
    "--gptq_group_size",
    "--gptq_desc_act",
    "--keep-fp-layers",
    "--desc-act",
    "--zero-point",
    "--no-zero-point",
    "--q-group-size",
    "--search-step",
    "--dump-salient",
    "--salient-quota",
    "--calib-size",
    "--calib-split",
    "--shard_size",
    "--modules_to_not_convert",
    "--duo_scaling",
    "--apply_clip",
    "--dry-run",
    "--max_calib_samples",
    "--max_calib_seq_len",
    "--calib_data",
    "--push-to-hub",
)


@pytest.mark.parametrize("flag", SPELLINGS)
def test_defect_6_every_flag_is_known_with_dashes_and_with_underscores(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        commands.quantize(["--help"])
    listed = re.findall(r"--[\w-]+", capsys.readouterr().out)
    stem = flag.removeprefix("--")
    spellings = {f"--{stem.replace('_', '-')}", f"--{stem.replace('-', '_')}"}
    if stem.startswith("no-"):
        spellings = {f"--no-{name.removeprefix('--no')[1:]}" for name in spellings}
    assert flag in listed and len(spellings.intersection(listed)) == 1
    for name in spellings:
        with pytest.raises(SystemExit):  # the flag is known, so another one is complained about
            commands.quantize([name, "1", "--unknown"])
        said = capsys.readouterr().err
        assert name not in said.rpartition("unrecognized")[2]


def test_defect_6_zero_points_are_on_unless_they_are_switched_off() -> None:
    assert not chosen().method.symmetric
    assert not chosen("--zero_point").method.symmetric
    assert chosen("--no-zero-point").method.symmetric


WATCH = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.exit(f"visible: {os.environ.get('CUDA_VISIBLE_DEVICES')!r}")
sys.meta_path.insert(0, Watch())
from omnispeech.quantize_cli.commands import quantize
sys.exit(quantize(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("flags", "environ", "visible"),
    [
        (["--force_cpu"], {}, "''"),
        ([], {"FORCE_CPU": "1"}, "''"),
        (["--no-force_cpu"], {"FORCE_CPU": "1"}, "'0'"),
        ([], {}, "'0'"),
    ],
)
def test_defect_6_force_cpu_hides_the_gpus_before_torch_is_imported(
    model: Path, flags: list[str], environ: dict[str, str], visible: str
) -> None:
    command = [sys.executable, "-c", WATCH, "--model_path", str(model / "nothing"), *flags]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", **environ}
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ran.stderr == f"visible: {visible}\n"


def test_defect_6_a_layer_that_ran_out_of_memory_starts_again_from_what_it_was(
    model: Path, text: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As if it had been started with the smaller micro-batch; no codes are quantized twice."""
    small = [*text, "--batch-tokens", "128", "--seq_len", "64"]
    assert quantize(model, *small, "--output_dir", str(tmp_path / "small")) == 0
    real = layer_quantizer.LayerQuantizer.quantize
    calls = []

    def fails_once(self: Any, block: Any, floats: Any, quantized: Any, kept: Any) -> Any:
        calls.append(floats.batch_tokens)
        if len(calls) == 2:  # the second layer, when half of the work is done
            block.mlp.up_proj.weight.zero_()
            raise torch.OutOfMemoryError
        return real(self, block, floats, quantized, kept)

    monkeypatch.setattr(layer_quantizer.LayerQuantizer, "quantize", fails_once)
    large = [*text, "--batch-tokens", "256", "--seq_len", "64"]
    assert quantize(model, *large, "--output_dir", str(tmp_path / "large")) == 0
    assert calls == [256, 256, 128]
    first, second = tensors(tmp_path / "small"), tensors(tmp_path / "large")
    same = [torch.equal(first[name], second[name]) for name in first]
    assert sum(same) / len(same) > 0.9


def test_defect_7_the_search_is_as_dense_as_it_is_asked_to_be(model: Path, text: list[str]) -> None:
    """The grid of m=2 holds that of m=1; refinement passes never make the loss larger."""
    assert quantize(model, *text, "--iter", "4", "--search-step", "2") == 0
    report = json.loads((model / "AWQ-4bit" / "quantization_report.json").read_text())
    linears = [linear for layer in report["layers"] for linear in layer["linears"].values()]
    losses = [linear["notes"]["losses"] for linear in linears if "losses" in linear["notes"]]
    assert losses
    assert all(b <= a * (1 + 1e-6) for run in losses for a, b in zip(run, run[1:], strict=False))


def test_defect_7_salient_columns_are_stored_in_int8_beside_an_unchanged_file(
    model: Path, text: list[str], tmp_path: Path
) -> None:
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    assert quantize(model, *text, "--rounding", "rtn", "--output_dir", str(plain)) == 0
    quota = ["--rounding", "rtn", "--salient-quota", "0.05", "--output_dir", str(marked)]
    assert quantize(model, *text, *quota) == 0
    assert (plain / "model.safetensors").read_bytes() == (marked / "model.safetensors").read_bytes()
    sidecar = load_file(marked / "salient" / "salient.safetensors")
    assert any(tensor.dtype == torch.int8 for tensor in sidecar.values())
    assert not (plain / "salient").exists()


def test_defect_7_salient_columns_beside_gptq_rounding_are_refused_with_the_reason(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(model, "--salient-quota", "0.004") == 2
    assert "salient columns are already compensated" in capsys.readouterr().err
