"""Quantized language models on disk: what config.json says about them, and how they are loaded
(spec: quantization 2.12)."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from omnispeech.checkpoint.files import build_on_meta
from omnispeech.checkpoint.salient import FILE, Sidecar
from omnispeech.checkpoint.shards import Shards
from omnispeech.checkpoint.weight_plan import Quantization, Target, WeightPlan
from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json
from omnispeech.layers.linear import QuantizedLinear
from omnispeech.layers.packing import Scheme
from omnispeech.models.qwen3 import CausalLM, Qwen3Config
from omnispeech.models.speech_lm import SpeechLM

OWN_KEY = "omnispeech_quantization"  # of 8-bit models, whose layout is nobody else's
AWQ_VERSIONS = {"gemm": "gemm", "gemv": "gemv", "gemvfast": "gemv_fast"}
SUPPORTED = "awq (gemm, gemv, gemv_fast), gptq, and the 8 bits of quantize_model_once.py"


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """What a config.json says about packed weights; None: there are none.

    Raises CheckpointError for a method or variant that cannot be read.
    """
    if own := config.get(OWN_KEY):
        scheme = _scheme(str(own.get("layout")), own.get("bits"), own.get("group_size"))
        return Quantization(scheme.layout, scheme)
    settings = config.get("quantization_config")
    if not settings:
        return None
    method = str(settings.get("quant_method")).lower()
    if method not in METHODS:
        raise CheckpointError(
            f"quant_method={settings.get('quant_method')!r} cannot be read; supported: {SUPPORTED}"
        )
    skipped = settings.get("modules_to_not_convert") or ()
    return Quantization(method, METHODS[method](settings), tuple(skipped))


def _awq(settings: Mapping[str, Any]) -> Scheme:
    version = str(settings.get("version", "gemm"))
    layout = AWQ_VERSIONS.get(re.sub("[^a-z]", "", version.lower()))
    if layout is None:
        raise CheckpointError(
            f"AWQ version {version!r} cannot be read; supported: {', '.join(AWQ_VERSIONS.values())}"
        )
    if settings.get("zero_point", True) is not True:
        raise CheckpointError(
            "AWQ with zero_point false has no one meaning in files; quantize again, symmetric "
            "weights are stored with zero points as well"
        )
    bits = settings.get("bits", settings.get("w_bit"))
    return _scheme(layout, bits, settings.get("group_size", settings.get("q_group_size")))


def _gptq(settings: Mapping[str, Any]) -> Scheme:
    version = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    if version != "gptq":
        raise CheckpointError(
            f"GPTQ checkpoint_format {version!r} cannot be read; supported: gptq (v1)"
        )
    rules = settings.get("dynamic") or {}
    if other := [rule for rule in rules if not rule.startswith("-:")]:
        raise CheckpointError(
            f"GPTQ with settings of its own for {other[0]!r} (dynamic) cannot be read; supported: "
            "one setting for all, and modules left out (-:)"
        )
    return _scheme("gptq", settings.get("bits"), settings.get("group_size"))


METHODS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {"awq": _awq, "gptq": _gptq}


def _scheme(layout: str, bits: Any, group_size: Any) -> Scheme:
    if type(bits) is not int or type(group_size) is not int:
        raise CheckpointError(
            f"the quantization has bits={bits!r} and group_size={group_size!r}; "
            "both must be whole numbers"
        )
    return Scheme(layout, bits, group_size)


def load_causal_lm(
    directory: Path, device: torch.device, dtype: torch.dtype, kernel: str = "auto"
) -> CausalLM:
    """A plain or quantized Hugging Face directory of a text model, or of a speech LM alone.

    dtype: of what is not packed, and of what its linears read. kernel: see `layers/linear.py`.
    """
    plan = plan_causal_lm(directory, device)
    plan.load(Target(device, dtype, kernel))
    return cast(CausalLM, plan.model)


def plan_causal_lm(
    directory: Path, device: torch.device, model: CausalLM | None = None
) -> WeightPlan:
    """Headers read and compared, no weights yet; raises CheckpointError for what does not fit.

    model: on meta, what the weights are for; None: what the directory itself describes.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; it should hold a language model")
    raw = read_json(directory / "config.json")
    if "llm_config" in raw:
        raise CheckpointError(
            f"{directory} holds a whole OpenS2S model and no language model alone"
        )
    config = Qwen3Config.from_dict(raw)
    tensors = Shards(directory, device)
    if model is None:
        kind = SpeechLM if "spk2tts.weight" in tensors.names else CausalLM
        model = cast(CausalLM, build_on_meta(lambda: kind(config)))
    elif differences := _differences(config, model.config):
        raise CheckpointError(
            f"{directory} does not belong to this checkpoint: {', '.join(differences)}; "
            "quantize that of this one"
        )
    return WeightPlan(
        model,
        tensors,
        read_quantization(raw),
        str(directory),
        elsewhere=tuple(n for n in tensors.names if n.endswith("rotary_emb.inv_freq")),
        sidecar=Sidecar(directory / FILE) if (directory / FILE).exists() else None,
    )


def _differences(config: Qwen3Config, wanted: Qwen3Config) -> list[str]:
    """Whether the embedding is tied is no difference: which head is stored decides."""
    ours, theirs = asdict(wanted), asdict(config)
    return [
        f"{name} {theirs[name]} instead of {ours[name]}"
        for name in ours
        if name != "tie_word_embeddings" and ours[name] != theirs[name]
    ]


def kernels_of(model: nn.Module) -> str:
    """The kernels of its quantized linears and how many have each: `torch (14)`; empty: none."""
    names = Counter(str(m.kernel_name) for m in model.modules() if isinstance(m, QuantizedLinear))
    return ", ".join(f"{name} ({count})" for name, count in sorted(names.items()))
