"""Quantized language models on disk: what is recognised, checked and loaded."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import (
    EIGHT_BIT,
    GEMM,
    INT8,
    dequantized,
    quantization_config,
    quantize_language_model,
    quantize_opens2s,
    save,
)
from torch import Tensor, nn

from omnispeech.checkpoint.files import assign_weights, build_on_meta
from omnispeech.checkpoint.opens2s import load_opens2s
from omnispeech.checkpoint.quantized import load_causal_lm, read_quantization
from omnispeech.checkpoint.shards import Shards
from omnispeech.checkpoint.tensor_file import TensorFile, write_tensor_file
from omnispeech.errors import CheckpointError
from omnispeech.layers.linear import QuantizedLinear
from omnispeech.layers.packing import Scheme, packed_dtypes, packed_shapes
from omnispeech.models.omnispeech import OmniSpeech, OmniSpeechConfig
from omnispeech.models.qwen3 import CausalLM, Qwen3Config
from omnispeech.models.speech_lm import SpeechLM

AWQ = Path(__file__).parent / "golden" / "awq"
OPENS2S = Path(__file__).parent / "golden" / "opens2s" / "opens2s-tiny"
CPU = torch.device("cpu")
LAYOUTS = [f"{layout}-g{size}" for layout in ("gemm", "gemv", "gemv_fast") for size in (64, 128)]
SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 8, "group_size": 64}


def golden(layout: str) -> Path:
    return AWQ / f"tiny-qwen3-awq-{layout}"


def scheme_of(directory: Path) -> Scheme:
    quantization = read_quantization(json.loads((directory / "config.json").read_text()))
    assert quantization is not None
    return quantization.scheme


def logits(model: CausalLM, ids: Tensor) -> Tensor:
    """[T] -> [T, V]"""
    cache = model.new_cache(len(ids))
    row = cache.allocate(len(ids))
    assert row is not None
    with torch.inference_mode():
        states = model(model.embed(ids), cache, cache.layout([(row, len(ids))]))
        return model.lm_head(states)


def plain(directory: Path, weights: Mapping[str, Tensor], kind: type[CausalLM] = CausalLM) -> Any:
    """A model of plain linears from the config of `directory`."""
    config = Qwen3Config.from_dict(json.loads((directory / "config.json").read_text()))
    model = build_on_meta(lambda: kind(config))
    assign_weights(model, weights, str(directory))
    return model


def reference(directory: Path) -> Any:
    return plain(directory, dequantized(directory, scheme_of(directory)))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture(scope="module")
def ids() -> Tensor:
    stored = torch.load(AWQ / "tiny-qwen3-fp16" / "reference.pt", weights_only=True)
    return stored["input_ids"][0]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden("gemm-g64"), tmp_path / "model"))


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    quantize_language_model(OPENS2S, tmp_path / "llm")
    return tmp_path / "llm"


def change(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Writes the weights of `directory` again, edited."""
    file = TensorFile(directory / "model.safetensors")
    tensors = {name: file.read(name) for name in file.entries}
    edit(tensors)
    save(directory, tensors, json.loads((directory / "config.json").read_text()))


# what config.json says


@pytest.mark.parametrize(
    ("version", "layout"),
    [
        ("gemm", "gemm"),
        ("GEMM", "gemm"),
        ("GEMV", "gemv"),
        ("gemv_fast", "gemv_fast"),
        ("GEMVFast", "gemv_fast"),
        ("gemv-fast", "gemv_fast"),
    ],
)
def test_versions_of_awq_are_known_in_any_spelling(version: str, layout: str) -> None:
    found = read_quantization({"quantization_config": SETTINGS | {"version": version}})
    assert found is not None
    assert (found.method, found.scheme) == ("awq", Scheme(layout, 4, 128))


def test_the_names_that_autoawq_uses_in_code_are_known() -> None:
    settings = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "gemm"}
    found = read_quantization({"quantization_config": settings})
    assert found is not None and found.scheme == Scheme("gemm", 4, 64)


@pytest.mark.parametrize("name", ["modules_to_not_convert", "checkpoint_format", "format"])
def test_gptq_of_the_first_format_is_known(name: str) -> None:
    value = ["lm_head"] if name == "modules_to_not_convert" else "gptq"
    found = read_quantization({"quantization_config": GPTQ | {name: value}})
    assert found is not None
    assert (found.method, found.scheme) == ("gptq", Scheme("gptq", 8, 64))


def test_eight_bit_models_of_ours_are_known() -> None:
    found = read_quantization(EIGHT_BIT)
    assert found is not None and (found.method, found.scheme) == ("int8", INT8)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}])
def test_nothing_said_means_nothing_packed(config: dict[str, Any]) -> None:
    assert read_quantization(config) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "'bitsandbytes' .*supported: awq"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors' .*supported: awq"),
        ({"quant_method": "fp8"}, "'fp8' .*supported: awq"),
        ({}, None),
        ({"bits": 4}, "quant_method=None .*supported"),
        (SETTINGS | {"version": "marlin"}, "'marlin' .*supported: gemm, gemv, gemv_fast"),
        (SETTINGS | {"zero_point": False}, "zero_point false"),
        (SETTINGS | {"bits": 3}, "holds 4 bits, not 3"),
        (SETTINGS | {"bits": "4"}, "bits='4'"),
        (GPTQ | {"bits": 3}, "holds 4 or 8 bits, not 3"),
        (GPTQ | {"group_size": None}, "group_size=None"),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, "'gptq_v2' .*supported: gptq"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 4}}}, "'\\+:.*down.*'"),
    ],
)
def test_what_cannot_be_read_is_refused(settings: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert read_quantization({"quantization_config": settings}) is None
        return
    with pytest.raises(CheckpointError, match=message):
        read_quantization({"quantization_config": settings})


def test_modules_that_gptq_left_out_are_no_hindrance() -> None:
    settings = GPTQ | {"dynamic": {"-:model\\.layers\\.0\\..*": {}}}
    assert read_quantization({"quantization_config": settings}) is not None


# files of AutoAWQ


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_autoawq_compute_what_their_codes_mean(layout: str, ids: Tensor) -> None:
    model = load_causal_lm(golden(layout), CPU, torch.float32, kernel="reference")
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 14
    assert relative(logits(model, ids), logits(reference(golden(layout)), ids)) < 1e-5


def half_rotary(
    positions: Tensor, head_dim: int, theta: float, _scaling: None = None
) -> tuple[Tensor, Tensor]:
    """What a model has that was cast to float16 as a whole: frequencies as well."""
    frequencies = (theta ** -(torch.arange(0, head_dim, 2) / head_dim)).half().float()
    angles = (positions[:, None] * frequencies).repeat(1, 2)[:, None]  # [T, 1, head_dim]
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("layout", ["gemm-g64", "gemm-g128"])
def test_logits_are_those_that_autoawq_computes_in_float16(
    layout: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omnispeech.models.qwen3.rotary_table", half_rotary)
    path = golden(layout) / "autoawq_cpu_logits_fp16.pt"
    theirs = torch.load(path, weights_only=True)[0]  # [T, V]
    ours = logits(load_causal_lm(golden(layout), CPU, torch.float16, kernel="reference"), ids)
    assert relative(ours, theirs) < 1.5e-3
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_the_kernel_of_torch_differs_by_the_rounding_of_bf16(ids: Tensor) -> None:
    path = golden("gemm-g128")
    exact = logits(reference(path), ids)
    found = logits(load_causal_lm(path, CPU, torch.float32, kernel="torch"), ids)
    assert 0 < relative(found, exact) < 0.03
    assert (found.argmax(-1) == exact.argmax(-1)).float().mean() > 0.95


def test_a_plain_directory_loads_with_plain_linears(
    ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omnispeech.models.qwen3.rotary_table", half_rotary)
    model = load_causal_lm(AWQ / "tiny-qwen3-fp16", CPU, torch.float32)
    stored = torch.load(AWQ / "tiny-qwen3-fp16" / "reference.pt", weights_only=True)
    assert not [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert relative(logits(model, ids), stored["logits_fp32"][0]) < 1e-5


# per module, the file decides


def test_a_linear_that_is_stored_plain_stays_plain(tmp_path: Path) -> None:
    left = "model.layers.1.mlp.down_proj"
    quantize_language_model(OPENS2S, tmp_path, leave=[f"{left}.weight"])
    model = load_causal_lm(tmp_path, CPU, torch.float32)
    assert isinstance(model.get_submodule(left), nn.Linear)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 13


@pytest.mark.parametrize("scheme", [INT8, Scheme("gptq", 8, 32), Scheme("gptq", 4, 32)], ids=str)
def test_other_layouts_compute_what_their_codes_mean(tmp_path: Path, scheme: Scheme) -> None:
    quantize_language_model(OPENS2S, tmp_path, scheme)
    ids = torch.arange(40)
    found = logits(load_causal_lm(tmp_path, CPU, torch.float32, kernel="reference"), ids)
    assert relative(found, logits(reference(tmp_path), ids)) < 1e-5


def test_the_speech_lm_brings_what_is_its_own(tmp_path: Path) -> None:
    quantize_language_model(OPENS2S, tmp_path, INT8, part="speech_lm")
    model = load_causal_lm(tmp_path, CPU, torch.float32)
    assert isinstance(model, SpeechLM)
    stored = load_opens2s(OPENS2S, CPU, torch.float32).model.tts_lm_model
    assert torch.equal(model.speaker(), stored.speaker())
    assert torch.equal(model.lm_head.weight, stored.lm_head.weight)


def test_a_bias_beside_packed_weights_is_kept(tmp_path: Path) -> None:
    quantize_language_model(OPENS2S, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "qwen2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def edit(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            attention = f"model.layers.{layer}.self_attn"
            for norm in ("q_norm", "k_norm"):
                del tensors[f"{attention}.{norm}.weight"]
            for name, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
                bias = torch.randn(rows, generator=generator)
                tensors[f"{attention}.{name}.bias"] = bias.half()

    change(tmp_path, edit)
    found = logits(load_causal_lm(tmp_path, CPU, torch.float32, "reference"), torch.arange(40))
    file = TensorFile(tmp_path / "model.safetensors")
    biases = {n: file.read(n).float() for n in file.entries if n.endswith(".bias")}
    model = plain(tmp_path, dequantized(tmp_path, GEMM) | biases)
    assert len(biases) == 6
    assert relative(found, logits(model, torch.arange(40))) < 1e-5


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "tied"])
def test_a_head_that_is_not_stored_is_the_embedding(llm: Path, stored: bool) -> None:
    config = json.loads((llm / "config.json").read_text()) | {"tie_word_embeddings": True}
    (llm / "config.json").write_text(json.dumps(config))
    if not stored:
        change(llm, lambda tensors: tensors.pop("lm_head.weight"))
    model = load_causal_lm(llm, CPU, torch.float32)
    shared = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert shared is not stored


# the columns beside


def write_sidecar(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    (directory / "salient").mkdir(exist_ok=True)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensor_file(directory / "salient/salient.safetensors", layout, tensors.__getitem__)


def columns(name: str, rows: int, indices: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (rows, len(indices))
    return {
        f"{name}.indices": torch.tensor(indices, dtype=torch.int32),
        f"{name}.residual": torch.randint(-127, 128, size, generator=generator, dtype=torch.int8),
        f"{name}.scales": torch.full((len(indices),), 0.01, dtype=torch.float16),
    }


def test_salient_columns_are_added_to_the_weights_that_they_are_of(llm: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    sidecar = columns(name, 64, [3, 100])
    write_sidecar(llm, sidecar)
    weights = dequantized(llm, GEMM)
    added = sidecar[f"{name}.residual"].float() * sidecar[f"{name}.scales"].float()
    weights[f"{name}.weight"][:, [3, 100]] += added
    found = logits(load_causal_lm(llm, CPU, torch.float32, "reference"), torch.arange(40))
    assert relative(found, logits(plain(llm, weights), torch.arange(40))) < 1e-5


@pytest.mark.parametrize(
    ("change_of", "message"),
    [
        ({"lm_head.indices": torch.zeros(1, dtype=torch.int32)}, "unexpected: lm_head.indices"),
        ({"N.scales": torch.ones(3).half()}, r"misshapen: N.scales \[3\] instead of \[2\]"),
        ({"N.scales": torch.ones(2)}, "of another type: N.scales torch.float32"),
        ({"N.indices": torch.tensor([3, 128], dtype=torch.int32)}, "outside 0 to 127"),
        ({"N.residual": None}, "missing: N.residual"),
    ],
)
def test_salient_columns_that_do_not_fit_are_refused(
    llm: Path, change_of: dict[str, Tensor | None], message: str
) -> None:
    name = "model.layers.0.mlp.down_proj"
    sidecar: dict[str, Any] = columns(name, 64, [3, 100])
    sidecar |= {key.replace("N.", f"{name}."): tensor for key, tensor in change_of.items()}
    write_sidecar(llm, {key: tensor for key, tensor in sidecar.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=message.replace("N.", f"{name}.")):
        load_causal_lm(llm, CPU, torch.float32)


# what does not fit


def test_all_that_does_not_fit_is_listed_before_anything_is_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    q_proj = "model.layers.0.self_attn.q_proj"

    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{q_proj}.qzeros"]
        tensors["model.layers.0.mlp.up_proj.scales"] = torch.zeros(3, 512).half()
        tensors["model.layers.1.mlp.up_proj.scales"] = torch.zeros(4, 512)
        tensors["model.norm.weight"] = torch.zeros(256, dtype=torch.int32)
        tensors["extra"] = torch.zeros(2)

    change(copy, edit)
    monkeypatch.setattr(Shards, "read_all", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError) as error:
        load_causal_lm(copy, CPU, torch.float32)
    for part in (
        f"1 missing: {q_proj}.qzeros",
        "1 unexpected: extra",
        "1 misshapen: model.layers.0.mlp.up_proj.scales [3, 512] instead of [4, 512]",
        "2 of another type: model.layers.1.mlp.up_proj.scales torch.float32 instead of torch.float",
        "model.norm.weight torch.int32 instead of floating point",
        str(copy),
    ):
        assert part in str(error.value)


def test_packed_weights_without_a_word_on_how_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no quantization_config that says how"):
        load_causal_lm(copy, CPU, torch.float32)


def test_the_wrong_group_size_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["group_size"] = 128
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="28 misshapen"):
        load_causal_lm(copy, CPU, torch.float32)


def test_a_packed_head_is_refused(copy: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["lm_head.qweight"] = torch.zeros(256, 64, dtype=torch.int32)

    change(copy, edit)
    with pytest.raises(CheckpointError, match="missing: lm_head.weight; .*: lm_head.qweight"):
        load_causal_lm(copy, CPU, torch.float32)


def test_a_packed_head_inside_a_whole_model_is_refused(tmp_path: Path) -> None:
    quantize_opens2s(OPENS2S, tmp_path / "8bit")

    def edit(tensors: dict[str, Tensor]) -> None:
        head = tensors.pop("tts_lm_model.lm_head.weight")
        tensors["tts_lm_model.lm_head.qweight"] = torch.zeros(head.shape, dtype=torch.int8)
        tensors["tts_lm_model.lm_head.scales"] = torch.ones(len(head), 1).half()

    change(tmp_path / "8bit", edit)
    with pytest.raises(CheckpointError, match="1 missing: tts_lm_model.lm_head.weight; 2 unexp"):
        load_opens2s(tmp_path / "8bit", CPU, torch.float32)


def test_an_unknown_method_names_what_is_known(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'bitsandbytes'.*supported: awq .*gptq"):
        load_causal_lm(copy, CPU, torch.float32)


def test_a_whole_model_is_no_language_model() -> None:
    for load in (
        lambda: load_causal_lm(OPENS2S, CPU, torch.float32),
        lambda: load_opens2s(OPENS2S, CPU, torch.float32, llm=OPENS2S),
    ):
        with pytest.raises(CheckpointError, match="holds a whole OpenS2S model"):
            load()


# reading


def test_tensors_are_read_in_the_order_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights of one linear lie apart: whole numbers are in other places than scales."""
    read: list[str] = []
    original = TensorFile.read_bytes

    def spy(self: TensorFile, name: str, *args: Any) -> None:
        read.append(name)
        original(self, name, *args)

    monkeypatch.setattr(TensorFile, "read_bytes", spy)
    monkeypatch.setattr("omnispeech.checkpoint.reader.MOST_THREADS", 1)
    load_causal_lm(golden("gemm-g64"), CPU, torch.float32)
    entries = TensorFile(golden("gemm-g64") / "model.safetensors").entries
    assert read == sorted(entries, key=lambda name: entries[name].start)


MEASURE = """
import sys
from pathlib import Path
import torch
from omnispeech.checkpoint.files import held_bytes
from omnispeech.checkpoint.quantized import load_causal_lm

def memory(key):
    line = next(l for l in open("/proc/self/status") if l.startswith(key))
    return int(line.split()[1]) * 1024

load_causal_lm(Path(sys.argv[1]), torch.device("cpu"), torch.bfloat16, kernel=sys.argv[3])
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model = load_causal_lm(Path(sys.argv[2]), torch.device("cpu"), torch.bfloat16, kernel=sys.argv[3])
print(memory("VmHWM") - before, held_bytes(model))
"""


def large(directory: Path) -> None:
    """Six layers of 27 MB, each 200 MB if it were dequantized to float32."""
    scheme = Scheme("gemm", 4, 128)
    raw = {
        "model_type": "qwen3",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 512,
    }
    model = build_on_meta(lambda: CausalLM(Qwen3Config.from_dict(raw)))
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            dtypes, shapes = packed_dtypes(scheme), packed_shapes(scheme, *tensor.shape)
            stem = name.removesuffix("weight")
            layout |= {f"{stem}{suffix}": (dtypes[suffix], shapes[suffix]) for suffix in shapes}
        else:
            layout[name] = (torch.bfloat16, tuple(tensor.shape))
    directory.mkdir()
    write_tensor_file(
        directory / "model.safetensors",
        layout,
        lambda name: torch.ones(layout[name][1], dtype=layout[name][0]),
    )
    (directory / "config.json").write_text(json.dumps(raw | quantization_config(scheme)))


def test_no_more_memory_is_taken_than_the_model_and_one_linear(tmp_path: Path) -> None:
    """A copy of all packed weights, or of one layer dequantized, would be more."""
    large(tmp_path / "large")
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(golden("gemm-g64")), str(tmp_path / "large"), "torch"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    peak, held = map(int, ran.stdout.split())
    assert 150e6 < held < 200e6
    assert peak < held + 180e6


# inside OpenS2S


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> list[Shards]:
    """Every Shards that is opened."""
    opened: list[Shards] = []
    original = Shards.__init__

    def spy(self: Shards, *args: Any) -> None:
        original(self, *args)
        opened.append(self)

    monkeypatch.setattr(Shards, "__init__", spy)
    return opened


@pytest.mark.parametrize("part", ["llm", "speech_lm"])
def test_no_byte_of_a_language_model_that_comes_from_elsewhere_is_read(
    tmp_path: Path, shards: list[Shards], part: Any
) -> None:
    quantize_language_model(OPENS2S, tmp_path, INT8, part=part)
    shards.clear()
    load_opens2s(OPENS2S, CPU, torch.float32, **{part: tmp_path})
    prefix = {"llm": "llm_model.", "speech_lm": "tts_lm_model."}[part]
    entries = TensorFile(OPENS2S / "model.safetensors").entries
    others = sum(entry.size for name, entry in entries.items() if not name.startswith(prefix))
    assert shards[0].bytes_read == others < sum(entry.size for entry in entries.values())


@pytest.mark.parametrize("part", ["llm", "speech_lm"])
def test_a_language_model_from_elsewhere_takes_the_place_of_its_own(
    tmp_path: Path, part: Any
) -> None:
    quantize_language_model(OPENS2S, tmp_path, INT8, part=part)
    loaded = load_opens2s(OPENS2S, CPU, torch.float32, kernel="reference", **{part: tmp_path})
    stored = load_opens2s(OPENS2S, CPU, torch.float32)
    name = {"llm": "llm_model", "speech_lm": "tts_lm_model"}[part]
    other = {"llm": "tts_lm_model", "speech_lm": "llm_model"}[part]
    found = getattr(loaded.model, name)
    kind = SpeechLM if part == "speech_lm" else CausalLM
    wanted = plain(tmp_path, dequantized(tmp_path, INT8), kind)
    ids = torch.arange(40)
    assert relative(logits(found, ids), logits(wanted, ids)) < 1e-5
    theirs, ours = getattr(stored.model, other), getattr(loaded.model, other)
    assert torch.equal(logits(ours, ids), logits(theirs, ids))
    assert loaded.text_generation == stored.text_generation
    assert not [n for n, p in loaded.model.named_parameters() if p.is_meta]


def test_both_language_models_may_come_from_elsewhere(tmp_path: Path) -> None:
    quantize_language_model(OPENS2S, tmp_path / "llm")
    quantize_language_model(OPENS2S, tmp_path / "speech", INT8, part="speech_lm")
    model = load_opens2s(
        OPENS2S, CPU, torch.float32, llm=tmp_path / "llm", speech_lm=tmp_path / "speech"
    ).model
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 28


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 128, "hidden_size 128 instead of 64"),
        ("num_hidden_layers", 3, "num_hidden_layers 3 instead of 2"),
        ("vocab_size", 601, "vocab_size 601 instead of 600"),
        ("rope_theta", 500, "rope_theta 500.0 instead of 1000000.0"),
        ("num_key_value_heads", 4, "num_key_value_heads 4 instead of 2"),
    ],
)
def test_an_llm_of_another_checkpoint_is_refused(
    llm: Path, key: str, value: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((llm / "config.json").read_text()) | {key: value}
    (llm / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(Shards, "read_all", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match=f"does not belong to this checkpoint.*{message}"):
        load_opens2s(OPENS2S, CPU, torch.float32, llm=llm)


def test_a_whole_model_in_eight_bits_loads_as_any_other(tmp_path: Path) -> None:
    quantize_opens2s(OPENS2S, tmp_path / "8bit")
    model = load_opens2s(tmp_path / "8bit", CPU, torch.float32, kernel="reference").model
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 28
    raw = json.loads((OPENS2S / "config.json").read_text())
    wanted = build_on_meta(lambda: OmniSpeech(OmniSpeechConfig.from_dict(raw)))
    assign_weights(wanted, dequantized(tmp_path / "8bit", INT8), "wanted")
    for name in ("llm_model", "tts_lm_model"):
        found, exact = (logits(getattr(m, name), torch.arange(40)) for m in (model, wanted))
        assert relative(found, exact) < 1e-5
    stored = load_opens2s(OPENS2S, CPU, torch.float32).model
    ids = torch.arange(40)
    assert 0 < relative(logits(model.llm_model, ids), logits(stored.llm_model, ids)) < 0.05


def test_the_log_tells_what_was_loaded_in_the_words_of_the_guides(
    llm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    load_opens2s(OPENS2S, CPU, torch.float32, llm=llm, kernel="reference")
    lines = [record.getMessage() for record in caplog.records]
    assert f"🔄 Loading AWQ-quantized LLM from {llm}..." in lines
    (loaded,) = [line for line in lines if "AWQ-quantized LLM loaded (4-bit, " in line]
    assert loaded.endswith(" s)") and re.search(r"\d [kMG]B, ", loaded)
    assert "kernels of its quantized linears: reference (14)" in lines
