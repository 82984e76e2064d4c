"""Runs in the environments of others, never imports ours: readers.py READER MODEL REFERENCE VARIANT

Loads a quantized model with somebody else's code, computes logits on the CPU, and prints one line
of JSON: how far they are from the reference, and which class did the work. Layouts that others only
run on a GPU are compared byte by byte with what AutoAWQ's own packing makes of the same weights.
"""

import importlib
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def autoawq(model: Path, dtype: torch.dtype) -> Any:
    """AutoAWQ's own model, by its plain path: on a CPU it asks for a package that is gone."""
    import awq.models.base
    from awq import AutoAWQForCausalLM

    awq.models.base.get_best_device = lambda: "naive"
    return AutoAWQForCausalLM.from_quantized(
        str(model), fuse_layers=False, device_map={"": "cpu"}, torch_dtype=dtype
    ).model


def transformers(model: Path, dtype: torch.dtype) -> Any:
    """What a user of transformers does; for AWQ and GPTQ files it calls gptqmodel."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype, device_map="cpu")


def gptqmodel(model: Path, dtype: torch.dtype) -> Any:
    from gptqmodel import GPTQModel

    return GPTQModel.load(str(model), device="cpu", dtype=dtype).model


def compressed_tensors(model: Path, dtype: torch.dtype) -> Any:
    """Converted by compressed-tensors and unpacked by its own code: transformers 5.23 itself does
    not read packed zero points of compressed-tensors 0.20."""
    from compressed_tensors.entrypoints.convert import convert_checkpoint
    from compressed_tensors.entrypoints.convert.converters import (
        AutoAWQConverter,
        CompressedTensorsDequantizer,
    )

    with tempfile.TemporaryDirectory() as folder:
        packed, plain = Path(folder) / "packed", Path(folder) / "plain"
        convert_checkpoint(str(model), packed, AutoAWQConverter.from_pretrained(str(model)))
        convert_checkpoint(packed, plain, CompressedTensorsDequantizer(packed, dtype=dtype))
        return transformers(plain, dtype)


READERS: dict[str, Callable[[Path, torch.dtype], Any]] = {
    "autoawq": autoawq,
    "transformers": transformers,
    "gptqmodel": gptqmodel,
    "compressed_tensors": compressed_tensors,
}


def same_bytes(layout: str, model: Path, reference: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Whether AutoAWQ packs each weight [N, K], with scales and zeros [N, G], the same way."""
    module = importlib.import_module(f"awq.modules.linear.{layout}")
    kind = {"gemv": "WQLinear_GEMV", "gemv_fast": "WQLinear_GEMVFast"}[layout]
    stored = {n: t for path in model.glob("*.safetensors") for n, t in load_file(path).items()}
    names = [n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")]
    equal = compared = 0
    for name in names:
        weight, scales, zeros = (reference[f"{name}.{k}"] for k in ("weight", "scales", "zeros"))
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float16)
        linear.weight.data = weight
        group_size = weight.shape[1] // scales.shape[1]
        packed = getattr(module, kind).from_linear(linear, 4, group_size, False, scales, zeros)
        for part in ("qweight", "qzeros", "scales"):
            compared += 1
            equal += same(getattr(packed, part), stored[f"{name}.{part}"])
    return {"equal_tensors": equal, "tensors": compared, "linear": kind}


FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def vllm_config(model: Path) -> dict[str, Any]:
    """vLLM's own reading of config.json: which of its linears it takes for quantized."""
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    raw = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config = get_quantization_config("auto_awq").from_config(raw["quantization_config"])
    parts = {
        fused.split(".")[1]: [name.split(".")[1] for name in names]
        for fused, names in FUSED.items()
        if len(names) > 1
    }
    stored = {n for path in model.glob("*.safetensors") for n in load_file(path)}
    equal = compared = 0
    for layer in range(raw["num_hidden_layers"]):
        for fused, names in FUSED.items():
            skipped = is_layer_skipped(
                f"model.layers.{layer}.{fused}",
                config.modules_to_not_convert,
                parts,
                match_mode="substring",
            )
            packed = {f"model.layers.{layer}.{name}.qweight" in stored for name in names}
            compared += 1
            equal += packed == {not skipped}
    return {"equal_linears": equal, "linears_compared": compared, "linear": type(config).__name__}


def same(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    return theirs.dtype == ours.dtype and torch.equal(theirs, ours)


def compare(network: Any, reference: dict[str, torch.Tensor]) -> dict[str, Any]:
    with torch.inference_mode():
        logits = network(input_ids=reference["ids"][None]).logits[0].float()  # [T, V]
    exact = reference["logits"]
    return {
        "relative_error": ((logits - exact).norm() / exact.norm()).item(),
        "same_choice": (logits.argmax(-1) == exact.argmax(-1)).float().mean().item(),
        "linear": linear_classes(network),
    }


def linear_classes(network: Any) -> str:
    """Of the seven linears of all layers."""
    kinds = {type(m).__name__ for n, m in network.named_modules() if n.endswith("_proj")}
    return ", ".join(sorted(kinds))


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "autoawq", "gptqmodel", "compressed-tensors", "vllm")
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in names if name in installed}


def main() -> None:
    reader, model, reference, variant = sys.argv[1:]
    expected = load_file(reference)
    if reader == "autoawq_bytes":
        answer = same_bytes(variant, Path(model), expected)
    elif reader == "vllm_config":
        answer = vllm_config(Path(model))
    else:
        network = READERS[reader](Path(model), getattr(torch, variant))
        answer = compare(network.eval(), expected)
    sys.stdout.write("\n" + json.dumps(answer | {"versions": versions()}) + "\n")


if __name__ == "__main__":
    main()
