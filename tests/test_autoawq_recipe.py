"""AutoAWQ's recipe against files that AutoAWQ 0.2.9 wrote."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from omnispeech.errors import CheckpointError
from omnispeech.layers.kv_cache import KVCache
from omnispeech.layers.packing import Scheme, unpack
from omnispeech.models.qwen3 import Block, Qwen3Config
from omnispeech.quantization.method import LayerResult
from omnispeech.quantization.methods import autoawq
from omnispeech.quantization.methods.autoawq import LayerWork, RangeRule
from omnispeech.quantization.methods.branches import BRANCHES, Branch
from omnispeech.quantization.methods.layer_quantizer import build_method
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.stream import Stream

GOLDEN = Path(__file__).parent / "golden" / "awq"
SOURCE = GOLDEN / "tiny-qwen3-fp16"
BLOCK = 256  # tokens


def shape() -> Qwen3Config:
    return Qwen3Config.from_dict(json.loads((SOURCE / "config.json").read_text()))


def source_block(layer: int) -> Block:
    block = Block(shape()).eval().requires_grad_(False)
    weights = load_file(SOURCE / "model.safetensors")
    prefix = f"model.layers.{layer}."
    block.load_state_dict(
        {k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)}
    )
    return block


def stream_of(states: list[Tensor]) -> Stream:
    counted = [torch.ones(len(state), dtype=torch.bool) for state in states]
    return Stream(shape(), states, counted, device=torch.device("cpu"), batch_tokens=4096)


def calibration() -> Stream:
    """Joined and cut into whole blocks, as AutoAWQ does it; no text here is too long for it."""
    tokenizer = Tokenizer.from_file(str(SOURCE / "tokenizer.json"))
    texts = json.loads((GOLDEN / "calib_texts.json").read_text())
    ids = torch.tensor([i for text in texts for i in tokenizer.encode(text.strip()).ids])
    embeddings = load_file(SOURCE / "model.safetensors")["model.embed_tokens.weight"]
    blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
    return stream_of(list(embeddings[blocks]))


def behind(stream: Stream, block: Block) -> Stream:
    """The states that a layer leaves behind in float16."""
    states: list[Tensor] = []
    for batch in stream.batches():
        layers, tokens, heads, width = batch.cache.keys.shape
        cache = KVCache(
            layers, tokens, heads, width, dtype=torch.float16, device=torch.device("cpu")
        )
        half = dataclasses.replace(batch, x=batch.x.half(), cache=cache)
        states += half.run(block.half()).split(BLOCK)
    return stream_of(states)


class AliasedWork(LayerWork):
    """On a CPU, AutoAWQ's copy of the weights is the weights themselves, so that what is meant to
    be restored after the first ratio is scaled by it already. The golden files were made there."""

    def _try(self, names: Any, scales: Tensor) -> None:
        super()._try(names, scales)
        if names[0] not in self.__dict__.setdefault("aliased", set()):
            self.__dict__["aliased"].update(names)
            for name in names:
                self.floats[name].mul_(scales)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sums in float32, as the float16 kernel does, in a third of its time."""
    out = x.float() @ weight.float().T
    return (out if bias is None else out + bias.float()).to(x.dtype)


@pytest.mark.parametrize(("group_size", "layer"), [(64, 0), (128, 1)])
def test_recipe_gives_what_autoawq_gave(
    group_size: int, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoawq, "LayerWork", AliasedWork)
    monkeypatch.setattr(torch.nn.functional, "linear", product)
    stream = calibration()
    with torch.no_grad():
        for earlier in range(layer):
            stream = behind(stream, source_block(earlier))
    settings = MethodSettings(compatible=True, group_size=group_size)
    result = build_method(settings).quantize(source_block(layer), stream, stream)
    golden = load_file(GOLDEN / f"tiny-qwen3-awq-gemm-g{group_size}" / "model.safetensors")
    prefix = f"model.layers.{layer}."
    # a step of the grid of ratios moves a norm weight by more than a tenth
    for name, stored in result.plain.items():
        torch.testing.assert_close(stored, golden[prefix + name], rtol=3e-3, atol=0)
    off, same_scales = [], []
    for name, weight in result.weights.items():
        tensors = {s: golden[f"{prefix}{name}.{s}"] for s in ("qweight", "qzeros", "scales")}
        wanted = unpack(tensors, Scheme("gemm", 4, group_size))
        off.append((weight.codes.int() - wanted.codes.int()).abs().flatten())
        same_scales.append(torch.isclose(weight.scales, wanted.scales, rtol=2e-3, atol=0).flatten())
        assert (weight.zeros == wanted.zeros).float().mean() > 0.99
    assert torch.cat(same_scales).float().mean() > 0.997
    assert (torch.cat(off) == 0).float().mean() >= 0.999
    assert (torch.cat(off) <= 1).float().mean() >= 0.9999


def small(**changes: Any) -> tuple[Block, Stream]:
    config = dataclasses.replace(
        shape(), hidden_size=64, intermediate_size=128, head_dim=16, **changes
    )
    torch.manual_seed(0)
    block = Block(config).eval().requires_grad_(False)
    for name, parameter in block.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.randn_like(parameter).exp())
        else:
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    stream = stream_of([torch.randn(30, 64) for _ in range(6)])
    stream.config = config
    return block, stream


def quantize(block: Block, stream: Stream, **settings: Any) -> LayerResult:
    chosen = {"compatible": True, "group_size": 32, "compatible_dtype": "float32", **settings}
    return build_method(MethodSettings(**chosen)).quantize(block, stream, stream)


def test_output_projection_is_scaled_only_without_shared_heads() -> None:
    for heads, scaled in ((2, False), (4, True)):
        result = quantize(*small(num_key_value_heads=heads))
        assert ("ratio" in result.linears["self_attn.o_proj"].notes) == scaled


def test_scales_and_ranges_can_be_left_out() -> None:
    block, stream = small()
    rule = RangeRule(32, symmetric=False)
    plain = rule.pack(block.mlp.gate_proj.weight.clone())
    result = quantize(block, stream, method="rtn")
    assert torch.equal(result.weights["mlp.gate_proj"].codes, plain.codes)
    clipped, stream = small()
    result = quantize(clipped, stream)
    free, stream = small()
    unclipped = quantize(free, stream, apply_clip=False)
    for name in ("mlp.gate_proj", "mlp.down_proj", "self_attn.v_proj", "self_attn.o_proj"):
        assert not torch.equal(result.weights[name].scales, unclipped.weights[name].scales)
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        assert torch.equal(result.weights[name].scales, unclipped.weights[name].scales)


@pytest.mark.parametrize("duo", ["on", "off"])
@pytest.mark.parametrize("branch", BRANCHES, ids=lambda b: b.module)
def test_scaled_layer_is_the_same_function_up_to_rounding(branch: Branch, duo: str) -> None:
    block, stream = small()
    reference, _ = small()
    quantize(block, stream, duo_scaling=duo)
    before = branch.norm_of(reference).weight
    assert not torch.allclose(branch.norm_of(block).weight, before, rtol=0.05)
    batch = next(stream.batches())
    wanted = branch.run(reference, batch, batch.x)
    assert (branch.run(block, batch, batch.x) - wanted).norm() < 0.2 * wanted.norm()


def test_recipe_hears_the_float_model_only() -> None:
    block, stream = small()
    result = quantize(block, stream)
    other, stream = small()
    damaged = stream_of([torch.full((3, 64), float("nan"))])
    settings = MethodSettings(compatible=True, group_size=32, compatible_dtype="float32")
    same = build_method(settings).quantize(other, stream, damaged)
    for name, weight in result.weights.items():
        assert torch.equal(weight.codes, same.weights[name].codes)


def test_no_finite_loss_is_an_error() -> None:
    block, stream = small()
    stream.states[0][0] = 1e30
    block.input_layernorm.weight.fill_(6e4)
    block.self_attn.q_proj.weight.fill_(6e4)
    block.self_attn.v_proj.weight.fill_(6e4)
    with pytest.raises(CheckpointError, match="self_attn.q_proj"):
        quantize(block, stream, compatible_dtype="float16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_second_rounding_changes_no_code(dtype: torch.dtype, symmetric: bool) -> None:
    torch.manual_seed(0)
    w = (torch.randn(64, 256) * 0.05).to(dtype)
    rule = RangeRule(64, symmetric=symmetric)
    stored = rule.pack(w)
    torch.testing.assert_close(stored.dequantize(), rule.rounded(w).float(), rtol=2e-3, atol=1e-6)
    assert stored.codes.max() <= 15
    if symmetric:
        assert (stored.zeros == 8).all()
