"""Random text models on disk, calibrations for them, and a method that only rounds."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from omnispeech.calibration.samples import Calibration, Sample
from omnispeech.checkpoint.files import build_on_meta
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.layers.packing import QuantizedWeight
from omnispeech.models.qwen3 import Block, CausalLM, Qwen3Config
from omnispeech.quantization.method import LayerResult, LinearReport
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.selection import LINEARS
from omnispeech.quantization.stream import Stream
from omnispeech.tiny.weights import random_weights

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling_own.py")
METHOD = MethodSettings(method="rtn", group_size=32)


def write_language_model(
    directory: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **config: Any
) -> Path:
    """A Hugging Face directory of a random text model; `config` changes CONFIG."""
    raw = {**CONFIG, **config}
    shape = Qwen3Config.from_dict(raw)
    weights = random_weights(build_on_meta(lambda: CausalLM(shape)), seed, dtype)
    if shape.tie_word_embeddings:
        del weights["lm_head.weight"]
    directory.mkdir(parents=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    for name in BESIDE:
        (directory / name).write_text(f"{name} of the model", encoding="utf-8")
    return directory


def language_model(directory: Path, **changes: Any) -> LanguageFiles:
    return LanguageFiles.open(write_language_model(directory, **changes))


def calibration(
    source: LanguageFiles, lengths: tuple[int, ...] = (40, 24, 64), seed: int = 1
) -> Calibration:
    """Random tokens of the model; the first two of each sequence do not count."""
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        ids = torch.randint(source.config.vocab_size, (length,), generator=draw)
        samples.append(Sample(source.embed(ids), torch.arange(length) >= 2))
    return Calibration(
        samples=tuple(samples),
        tokens={"text": sum(lengths) - 2 * len(lengths)},
        sources=("random",),
        digest=f"random {lengths} {seed}",
    )


@dataclass(frozen=True)
class Rounding:
    """Rounds to nearest, one range for each row and group, with zero in it."""

    settings: MethodSettings

    def quantize(
        self, block: Block, floats: Stream, quantized: Stream, kept: Collection[str] = ()
    ) -> LayerResult:
        rounded = [name for name in LINEARS if name not in kept]
        weights = {name: self.rounded(block.get_submodule(name).weight) for name in rounded}
        loss = output_error(block, weights, quantized)
        for name, weight in weights.items():
            block.get_submodule(name).weight.data.copy_(weight.dequantize())
        plain = {
            name: parameter
            for name, parameter in block.named_parameters()
            if name.removesuffix(".weight") not in weights
        }
        report = LinearReport(loss=loss, nearest_loss=loss, notes={"scales": "identity"})
        return LayerResult(weights=weights, plain=plain, linears=dict.fromkeys(rounded, report))

    def rounded(self, weight: Tensor) -> QuantizedWeight:
        n, k = weight.shape
        top = 2**self.settings.bits - 1
        columns = k if self.settings.group_size == -1 else self.settings.group_size
        groups = weight.detach().view(n, -1, columns)  # [N, G, columns]
        if self.settings.symmetric:
            scales = (groups.abs().amax(-1) / (top // 2)).half()
            zeros = torch.full_like(scales, (top + 1) // 2)
        else:
            low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
            scales = ((high - low) / top).half()
            zeros = (-low / scales.float()).round().clamp(0, top)
        codes = (groups / scales.float()[..., None] + zeros.float()[..., None]).round()
        return QuantizedWeight(
            codes=codes.clamp(0, top).view(n, k).to(torch.uint8),
            zeros=zeros.to(torch.uint8),
            scales=scales,
            bits=self.settings.bits,
        )


def output_error(block: Block, weights: dict[str, QuantizedWeight], stream: Stream) -> float:
    """Of the first linear, so that the report depends on what is in the stream."""
    linear = block.self_attn.q_proj
    error = linear.weight - weights["self_attn.q_proj"].dequantize()
    x = torch.cat([block.input_layernorm(b.x)[b.counted] for b in stream.batches()])
    return ((x @ error.T).square().mean() / linear(x).square().mean()).item()
