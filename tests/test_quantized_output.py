"""The files of a quantized directory, and the check that they mean what was quantized."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from language_model_files import BESIDE, METHOD, Rounding, language_model
from quantization_runs import quantize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.quantized import read_quantization
from omnispeech.errors import CheckpointError
from omnispeech.layers.packing import QuantizedWeight, Scheme
from omnispeech.models.qwen3 import Block
from omnispeech.quantization import verify
from omnispeech.quantization.method import LayerResult
from omnispeech.quantization.methods.salient import SalientColumns
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.output import quantization_config
from omnispeech.quantization.report import read_report
from omnispeech.quantization.stored import (
    half_in_place,
    install,
    tensor_digest,
    to_half,
    weight_digest,
)
from omnispeech.quantization.stream import Stream
from omnispeech.quantization.verify import StoredModel, check_digests

KEPT = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


@pytest.fixture
def source(tmp_path: Path) -> LanguageFiles:
    return language_model(tmp_path / "model")


# --- files


def test_one_file_when_it_fits(source: LanguageFiles, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", shard_size=10**6)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == [
        "model.safetensors"
    ]


def test_shards_hold_everything_once_and_are_no_larger_than_asked(
    source: LanguageFiles, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "one")
    quantize(source, tmp_path / "many", shard_size=20_000)
    whole = load_file(tmp_path / "one/model.safetensors")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for i, path in enumerate(shards, 1):
        assert path.name == f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = load_file(path)
        assert sum(t.nbytes for t in tensors.values()) <= 20_000
        assert all(index["weight_map"][name] == path.name for name in tensors)
        found |= tensors
    assert len(shards) > 3
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())


def test_files_say_they_are_of_pytorch(source: LanguageFiles, tmp_path: Path) -> None:
    """transformers refuses a file without this."""
    quantize(source, tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tokenizer_template_and_code_come_along(source: LanguageFiles, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out")
    for name in BESIDE:
        assert (tmp_path / "out" / name).read_text() == f"{name} of the model"


def test_the_config_is_that_of_autoawq(source: LanguageFiles, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": 32,
        "bits": 4,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    assert config["torch_dtype"] == "float16"
    assert {k: v for k, v in config.items() if k in source.raw and k != "torch_dtype"} == {
        k: v for k, v in source.raw.items() if k != "torch_dtype"
    }
    own = json.loads((tmp_path / "out/quant_config.json").read_text())
    assert (own["w_bit"], own["q_group_size"], own["version"]) == (4, 32, "gemm")
    assert "dynamic" not in own


def test_kept_layers_are_told_to_gptqmodel_in_the_file_that_it_reads(
    source: LanguageFiles, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "out", keep_fp_layers=(-1,))
    own = json.loads((tmp_path / "out/quant_config.json").read_text())
    last = source.config.num_hidden_layers - 1
    assert rf"-:^model\.layers\.{last}\.mlp\.down_proj$" in own["dynamic"]
    assert len(own["dynamic"]) == 7
    stored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert "dynamic" not in stored


def test_symmetric_codes_are_stored_with_zero_points(source: LanguageFiles, tmp_path: Path) -> None:
    method = MethodSettings(method="rtn", group_size=32, zero_point=False)
    quantize(source, tmp_path / "out", method=method)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["zero_point"] is True
    tensors = load_file(tmp_path / "out/model.safetensors")
    zeros = [t for name, t in tensors.items() if name.endswith(".qzeros")]
    assert zeros and all((t == -2004318072).all() for t in zeros)  # 0x88888888


def test_the_gptq_config_says_what_its_loaders_ask_for() -> None:
    config = quantization_config(Scheme("gptq", 8, 128), [], act_order=True)
    assert config == {
        "quant_method": "gptq",
        "bits": 8,
        "group_size": 128,
        "desc_act": True,
        "sym": True,
        "checkpoint_format": "gptq",
        "true_sequential": True,
        "lm_head": False,
    }


@pytest.mark.parametrize("scheme", [Scheme("gemm", 4, 128), Scheme("gptq", 4, 32)])
def test_the_server_reads_the_config_as_it_was_meant(scheme: Scheme) -> None:
    config = quantization_config(scheme, KEPT, act_order=False)
    found = read_quantization({"quantization_config": config})
    assert found is not None
    assert found.scheme == scheme
    assert list(found.not_converted) == KEPT


def test_gptq_rules_leave_out_the_kept_modules_alone() -> None:
    config = quantization_config(Scheme("gptq", 4, 32), KEPT[:1], act_order=False)
    assert config["dynamic"] == {r"-:^model\.layers\.1\.self_attn\.q_proj$": {}}


class Salient(Rounding):
    def quantize(
        self, block: Block, floats: Stream, quantized: Stream, kept: Collection[str] = ()
    ) -> LayerResult:
        result = super().quantize(block, floats, quantized)
        columns = SalientColumns(
            torch.tensor([1, 5]), torch.ones(64, 2, dtype=torch.int8), torch.ones(2).half()
        )
        return LayerResult(
            weights=result.weights,
            plain=result.plain,
            linears=result.linears,
            salient={"self_attn.q_proj": columns},
        )


def test_salient_columns_lie_beside_a_model_that_is_the_same_without(
    source: LanguageFiles, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "plain")
    quantize(source, tmp_path / "salient", build=Salient)
    sidecar = load_file(tmp_path / "salient/salient/salient.safetensors")
    assert sidecar["model.layers.2.self_attn.q_proj.indices"].tolist() == [1, 5]
    assert len(sidecar) == 9 and not (tmp_path / "plain/salient").exists()
    files = [tmp_path / name / "model.safetensors" for name in ("plain", "salient")]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- verification


def test_a_model_loaded_back_ends_where_the_quantized_stream_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a block that is not what was stored the run must fail."""
    source = language_model(tmp_path / "model", dtype=torch.float32)
    report = quantize(source, tmp_path / "out")
    assert report.data["verified"] < 1e-5

    def wrong(block: Block, weights: Any, plain: Any) -> None:
        install(block, weights, plain)
        block.mlp.down_proj.weight.data *= 1.01

    monkeypatch.setattr(verify, "install", wrong)
    with pytest.raises(CheckpointError, match="does not compute what was quantized"):
        quantize(source, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.qzeros", "model.layers.0.input_layernorm.weight"]
)
def test_one_changed_number_is_found(name: str, source: LanguageFiles, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors[name].view(-1)[3] += 1
    save_file(tensors, tmp_path / "out/model.safetensors")
    with pytest.raises(CheckpointError, match=rf"first is {name.rpartition('.')[0]}"):
        check(tmp_path / "out")


def test_a_missing_and_an_unexpected_tensor_are_found(
    source: LanguageFiles, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    save_file({**tensors, "more": torch.ones(1)}, tmp_path / "out/model.safetensors")
    with pytest.raises(CheckpointError, match="1 tensors are unexpected, the first is more"):
        check(tmp_path / "out")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "out/model.safetensors")
    with pytest.raises(CheckpointError, match="1 tensors are missing, the first is model.norm"):
        check(tmp_path / "out")


def check(directory: Path) -> None:
    data = read_report(directory, found=True).data
    stored = StoredModel(directory, Scheme(**data["scheme"]), data["kept"])
    check_digests(stored, data["digests"], directory)


# --- what is stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64])
def test_a_tensor_turns_into_float16_in_its_own_memory(dtype: torch.dtype) -> None:
    """Larger than a piece, so that what is written must not run over what is still to be read."""
    values = torch.randn(700, 8000, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = values.to(torch.float16)
    place = values.data_ptr()
    found = half_in_place(values, "values")
    assert torch.equal(found, expected) and found.data_ptr() == place


@pytest.mark.parametrize("value", [7e4, -7e4, float("nan"), float("inf")])
def test_what_float16_cannot_hold_is_named(value: float) -> None:
    values = torch.ones(4)
    values[2] = value
    with pytest.raises(CheckpointError, match=r"model\.norm has values"):
        to_half(values, "model.norm")


def weight() -> QuantizedWeight:
    draw = torch.Generator().manual_seed(0)
    return Rounding(METHOD).rounded(torch.randn(8, 64, generator=draw))


def test_a_digest_is_of_the_meaning() -> None:
    w = weight()
    groups = torch.arange(64, dtype=torch.int32) // 32
    same = QuantizedWeight(codes=w.codes, zeros=w.zeros, scales=w.scales, bits=4, group_of=groups)
    assert weight_digest(w) == weight_digest(same)
    for field in ("codes", "zeros", "scales"):
        values = {name: getattr(w, name).clone() for name in ("codes", "zeros", "scales")}
        values[field].view(torch.uint8)[7, 1] ^= 1
        assert weight_digest(QuantizedWeight(**values, bits=4)) != weight_digest(w)


def test_a_digest_knows_type_and_shape() -> None:
    zeros = torch.zeros(4, 2, dtype=torch.float16)
    others = (zeros.view(2, 4), zeros.view(torch.int16))
    assert len({tensor_digest(t) for t in (zeros, *others)}) == 3
