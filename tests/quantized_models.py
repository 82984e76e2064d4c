"""Writes quantized models by rounding each weight to the nearest code."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnispeech.checkpoint.language import LanguageFiles, PartName
from omnispeech.checkpoint.shards import Shards
from omnispeech.checkpoint.tensor_file import write_tensor_file
from omnispeech.layers.packing import QuantizedWeight, Scheme, pack, unpack

CPU = torch.device("cpu")
GEMM = Scheme("gemm", 4, 32)
INT8 = Scheme("int8", 8, -1)
EIGHT_BIT = {"omnispeech_quantization": {"layout": "int8", "bits": 8, "group_size": -1}}


def rounded(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """weight [N, K]; symmetric for the layouts that know nothing else."""
    n, k = weight.shape
    grouped = weight.float().view(n, -1, scheme.columns(k))  # [N, G, columns]
    top = 2**scheme.bits - 1
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)  # [N, G]
    if scheme.layout in ("gptq", "int8"):
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / top).clamp(min=1e-4).half()
    zeros = (-low / scales.float()).round().clamp(0, top)
    if scheme.layout in ("gptq", "int8"):
        zeros = torch.full_like(zeros, 2 ** (scheme.bits - 1))
    codes = (grouped / scales.float()[..., None]).round() + zeros[..., None]
    return QuantizedWeight(
        codes=codes.clamp(0, top).view(n, k).to(torch.uint8),
        zeros=zeros.to(torch.uint8),
        scales=scales,
        bits=scheme.bits,
    )


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    common = {"bits": scheme.bits, "group_size": scheme.group_size}
    if scheme.layout == "int8":
        return EIGHT_BIT
    if scheme.layout == "gptq":
        more = {"quant_method": "gptq", "sym": True, "desc_act": False}
        return {"quantization_config": common | more | {"checkpoint_format": "gptq"}}
    more = {"quant_method": "awq", "zero_point": True, "version": scheme.layout}
    return {"quantization_config": common | more | {"modules_to_not_convert": None}}


def packed(
    weights: Mapping[str, Tensor], scheme: Scheme, names: Collection[str]
) -> dict[str, Tensor]:
    """`weights`, with those of `names` packed."""
    tensors = {name: tensor for name, tensor in weights.items() if name not in names}
    for name in names:
        parts = pack(rounded(weights[name], scheme), scheme)
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{suffix}": part for suffix, part in parts.items()}
    return tensors


def save(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensor_file(directory / "model.safetensors", layout, tensors.__getitem__)
    (directory / "config.json").write_text(json.dumps(config))


def quantize_language_model(
    opens2s: Path,
    target: Path,
    scheme: Scheme = GEMM,
    *,
    part: PartName = "llm",
    leave: Collection[str] = (),
) -> None:
    """The LLM or speech LM of an OpenS2S directory as one of its own; `leave`: stay as they are."""
    source = LanguageFiles.open(opens2s, part)
    names = [
        name
        for index in range(source.config.num_hidden_layers)
        for name in source.layer_names(index)
    ]
    weights = {name: source.read(name, torch.float32) for name in (*names, *source.outside_names())}
    linears = [name for name in names if name.endswith("_proj.weight") and name not in leave]
    save(target, packed(weights, scheme, linears), source.raw | quantization_config(scheme))


def quantize_opens2s(opens2s: Path, target: Path) -> None:
    """The whole model, the linears of both language models in eight bits."""
    shutil.copytree(opens2s, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    shards = Shards(opens2s, CPU)
    weights = {name: shards.read(name, CPU, torch.float32) for name in shards.names}
    linears = [
        name
        for name in weights
        if name.startswith(("llm_model.model.layers", "tts_lm_model.model.layers"))
        and name.endswith("_proj.weight")
    ]
    config = json.loads((opens2s / "config.json").read_text())
    save(target, packed(weights, INT8, linears), config | EIGHT_BIT)


def dequantized(directory: Path, scheme: Scheme) -> dict[str, Tensor]:
    """All weights of a directory as a model without quantized linears holds them, in float32."""
    shards = Shards(directory, CPU)
    stored = {name: shards.read(name, CPU, torch.float16) for name in shards.names}
    modules = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    weights = {}
    for name in shards.names:
        if name.rpartition(".")[0] not in modules:
            weights[name] = shards.read(name, CPU, torch.float32)
    for module in modules:
        parts = {
            suffix: stored[f"{module}.{suffix}"]
            for suffix in ("qweight", "qzeros", "scales", "g_idx")
            if f"{module}.{suffix}" in stored
        }
        weights[f"{module}.weight"] = unpack(parts, scheme).dequantize()
    return weights
