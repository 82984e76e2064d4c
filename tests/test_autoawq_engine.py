"""`--engine autoawq` with a stand-in for the package, which is not installed where tests run."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.quantization import autoawq_engine
from omnispeech.quantization.autoawq_engine import AutoAWQJob, run_autoawq
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.run_settings import RunSettings

GOLDEN = Path(__file__).parent / "golden" / "awq"
FLOAT, QUANTIZED = GOLDEN / "tiny-qwen3-fp16", GOLDEN / "tiny-qwen3-awq-gemm-g64"
SAMPLES = [[5, 6, 7, 8], [9, 10, 11]]


@dataclass
class Recorder:
    """What AutoAWQ was asked for."""

    loaded: dict[str, Any]
    config_seen: dict[str, Any]
    weights_seen: dict[str, Tensor]
    tokenizer: Any = None
    quantize: dict[str, Any] | None = None
    shard_size: str = ""
    fail: Exception | None = None
    after_saving: Callable[[Path], None] = lambda path: None


@pytest.fixture
def awq(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Answers with the files that AutoAWQ 0.2.9 wrote of the golden model."""
    seen = Recorder({}, {}, {})

    class Model:
        model = SimpleNamespace(state_dict=lambda: load_file(QUANTIZED / "model.safetensors"))

        @classmethod
        def from_pretrained(cls, path: str, **options: Any) -> "Model":
            seen.loaded = {"path": Path(path), **options}
            seen.config_seen = json.loads((Path(path) / "config.json").read_text())
            seen.weights_seen = load_file(Path(path) / "model.safetensors")
            return cls()

        def quantize(self, tokenizer: Any, **options: Any) -> None:
            seen.tokenizer, seen.quantize = tokenizer, options
            if seen.fail:
                raise seen.fail

        def save_quantized(self, path: str, shard_size: str) -> None:
            Path(path).mkdir()
            seen.shard_size = shard_size
            shutil.copy(QUANTIZED / "model.safetensors", path)
            config = json.loads((QUANTIZED / "config.json").read_text())
            del config["rope_theta"]  # as transformers 5 writes it
            config["rope_parameters"] = {"rope_theta": 1e6}
            (Path(path) / "config.json").write_text(json.dumps(config))
            seen.after_saving(Path(path))

    package = ModuleType("awq")
    package.AutoAWQForCausalLM = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "awq", package)
    return seen


@pytest.fixture
def job() -> AutoAWQJob:
    return AutoAWQJob(
        source=LanguageFiles.open(FLOAT),
        samples=SAMPLES,
        method=MethodSettings(compatible=True, group_size=64),
        settings=RunSettings(),
        seq_len=4,
    )


def test_the_options_arrive_under_the_names_of_autoawq(
    awq: Recorder, job: AutoAWQJob, tmp_path: Path
) -> None:
    settings = replace(
        job.settings, layout="gemv", modules_to_not_convert=("o_proj",), batch_tokens=12
    )
    method = replace(job.method, duo_scaling="off", apply_clip=False)
    run_autoawq(replace(job, settings=settings, method=method), tmp_path / "out")
    assert awq.quantize == {
        "quant_config": {
            "zero_point": True,
            "q_group_size": 64,
            "w_bit": 4,
            "version": "gemv",
            "modules_to_not_convert": ["o_proj"],
        },
        "calib_data": SAMPLES,
        "duo_scaling": False,
        "apply_clip": False,
        "n_parallel_calib_samples": 3,
        "max_calib_samples": 2,
        "max_calib_seq_len": 4,
    }
    assert awq.tokenizer.encode("a") == [awq.tokenizer.convert_tokens_to_ids("a")]


def test_autoawq_is_given_a_whole_plain_model_and_no_remote_code(
    awq: Recorder, job: AutoAWQJob, tmp_path: Path
) -> None:
    run_autoawq(job, tmp_path / "out")
    assert awq.config_seen["model_type"] == "qwen3"
    original = load_file(FLOAT / "model.safetensors")
    assert awq.weights_seen.keys() == original.keys()
    assert all(torch.equal(awq.weights_seen[name], original[name]) for name in original)
    assert awq.loaded["trust_remote_code"] is False
    assert awq.loaded["device_map"] == "cpu"
    assert not awq.loaded["path"].exists()


def test_the_result_is_complete_for_every_loader(
    awq: Recorder, job: AutoAWQJob, tmp_path: Path
) -> None:
    """The config says rope_theta, which transformers 5 leaves out, and how it is quantized."""
    data = run_autoawq(job, tmp_path / "out")
    assert data is not None and data["compared"] == 53
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 1e6
    expected = json.loads((QUANTIZED / "config.json").read_text())["quantization_config"]
    assert config["quantization_config"] == expected
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "quant_config.json").is_file()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o044
    Manifest(tmp_path).check("out", deep=True)
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left == {"out", "omnispeech-manifest.json"}


def test_an_earlier_result_is_checked_and_never_replaced_silently(
    awq: Recorder, job: AutoAWQJob, tmp_path: Path
) -> None:
    run_autoawq(job, tmp_path / "out")
    awq.quantize = None
    found = run_autoawq(job, tmp_path / "out")
    assert found is not None and found["found"] and awq.quantize is None
    with pytest.raises(ConfigError, match=r"apply_clip was True and is False.*--overwrite"):
        run_autoawq(replace(job, method=replace(job.method, apply_clip=False)), tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        run_autoawq(job, tmp_path / "out")


def test_a_file_that_is_not_what_was_in_memory_is_found(
    awq: Recorder, job: AutoAWQJob, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.scales"

    def damage(path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        save_file(weights | {name: weights[name] * 2}, path / "model.safetensors")

    awq.after_saving = damage
    with pytest.raises(CheckpointError, match=name):
        run_autoawq(job, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_was_not_saved_is_found(
    awq: Recorder, job: AutoAWQJob, tmp_path: Path
) -> None:
    def lose(path: Path) -> None:
        weights = load_file(path / "model.safetensors")
        weights.pop("lm_head.weight")
        save_file(weights, path / "model.safetensors")

    awq.after_saving = lose
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        run_autoawq(job, tmp_path / "out")


def test_a_failure_of_autoawq_says_what_to_do_and_leaves_no_copy_of_the_model(
    awq: Recorder, job: AutoAWQJob, tmp_path: Path
) -> None:
    awq.fail = AssertionError()
    with pytest.raises(CheckpointError, match="AssertionError.*--no-apply_clip.*--engine native"):
        run_autoawq(job, tmp_path / "out")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_without_autoawq_the_command_that_installs_it_is_named(
    job: AutoAWQJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "awq", None)
    command = r"pip install --no-deps --no-build-isolation autoawq==0\.2\.9"
    with pytest.raises(ConfigError, match=command):
        run_autoawq(job, tmp_path / "out")


def test_a_model_that_does_not_fit_into_memory_is_refused_before_it_is_extracted(
    awq: Recorder, job: AutoAWQJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoawq_engine, "available_memory", lambda: 1_000_000)
    with pytest.raises(ConfigError, match="--engine native"):
        run_autoawq(job, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(awq: Recorder, job: AutoAWQJob, tmp_path: Path) -> None:
    settings = replace(job.settings, dry_run=True)
    assert run_autoawq(replace(job, settings=settings), tmp_path / "out") is None
    assert not any(tmp_path.iterdir())
