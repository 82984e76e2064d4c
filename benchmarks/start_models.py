"""A models directory of several GB whose numbers mean nothing, quickly written."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.shards import Shards
from omnispeech.checkpoint.tensor_file import Layout, write_tensor_file
from omnispeech.layers.packing import QuantizedWeight, Scheme, pack
from omnispeech.tiny.directory import write_tiny
from omnispeech.tiny.shape import LanguageShape, TinyShape

CPU = torch.device("cpu")
SCHEME = Scheme("gemm", 4, 128)
AWQ, OPENS2S, PLAIN = "OpenS2S-llm-awq", "OpenS2S", "plain-llm"
SHAPE = LanguageShape(hidden=2048, inner=6144, layers=1, heads=16, kv_heads=8, head_width=128)
LAYER_BYTES = 2 * (2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144)
LAYER = re.compile(r"^(llm_model\.)?model\.layers\.\d+\.")


def make_models(directory: Path, gigabytes: float) -> None:
    """OpenS2S with an LLM of so many GB in bfloat16, the same LLM alone, and one in 4 bits."""
    layers = max(1, round(gigabytes * 1e9 / LAYER_BYTES))
    done = directory / f"{layers}-layers"
    if done.exists():
        return
    shutil.rmtree(directory, ignore_errors=True)
    write_tiny(directory, shape=TinyShape(llm=SHAPE))
    opens2s = directory / OPENS2S
    language = LanguageFiles.open(opens2s, "llm")
    raw = language.raw | {"num_hidden_layers": layers}
    layout, tensors = _stored(Shards(opens2s, CPU))
    config = json.loads((opens2s / "config.json").read_text(encoding="utf-8"))
    config["llm_config"]["num_hidden_layers"] = layers
    for path in opens2s.glob("model*"):
        path.unlink()
    _write(opens2s, layout, tensors, config, layers)
    prefix = "llm_model."
    layout = {n.removeprefix(prefix): e for n, e in layout.items() if n.startswith(prefix)}
    tensors = {n.removeprefix(prefix): t for n, t in tensors.items()}
    _write(directory / PLAIN, layout, tensors, raw, layers)
    packed = _packed(tensors, layout)
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    stored = {n: (t.dtype, tuple(t.shape)) for n, t in packed.items()}
    raw |= {"quantization_config": quantization}
    _write(directory / AWQ, stored, packed, raw, layers)
    for name in (OPENS2S, AWQ):
        Manifest(directory).enter(name, {"by": "bench.py start"})
    done.touch()


def _stored(shards: Shards) -> tuple[Layout, dict[str, Tensor]]:
    tensors = {name: shards.read(name, CPU, shards.dtype(name)) for name in shards.names}
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, tensors


def _packed(tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Random codes: the linears of a layer, everything else as it is."""
    found: dict[str, Tensor] = {}
    for name, (_, shape) in layout.items():
        if not name.endswith("_proj.weight"):
            found[name] = tensors[name]
            continue
        rows, columns = shape
        scales = torch.full((rows, columns // 128), 1 / (4.6 * columns**0.5)).half()
        weight = QuantizedWeight(
            codes=torch.randint(16, shape, dtype=torch.uint8),
            zeros=torch.full_like(scales, 8, dtype=torch.uint8),
            scales=scales,
            bits=4,
        )
        stem = name.removesuffix("weight")
        found |= {f"{stem}{suffix}": part for suffix, part in pack(weight, SCHEME).items()}
    return found


def _write(
    directory: Path, layout: Layout, tensors: dict[str, Tensor], config: Any, layers: int
) -> None:
    """Every layer of the LLM is the first one again."""
    directory.mkdir(exist_ok=True)
    whole: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, entry in layout.items():
        for layer in range(layers if LAYER.match(name) else 1):
            whole[LAYER.sub(rf"\g<1>model.layers.{layer}.", name)] = entry

    def read(name: str) -> Tensor:
        return tensors[LAYER.sub(r"\g<1>model.layers.0.", name)]

    write_tensor_file(directory / "model.safetensors", whole, read)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
