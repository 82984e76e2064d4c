"""How much memory the models of a start take, from their headers and configs: no tensor is read."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from omnispeech.checkpoint.decoder_config import read_config
from omnispeech.checkpoint.files import build_on_meta
from omnispeech.checkpoint.models_directory import Sources
from omnispeech.checkpoint.opens2s import LANGUAGE_MODELS, plan_opens2s
from omnispeech.checkpoint.salient import FILE as SALIENT
from omnispeech.checkpoint.weight_plan import Target, WeightPlan
from omnispeech.json_file import read_json
from omnispeech.layers.int4_matmul import GROUP_SIZES
from omnispeech.layers.linear import known_kernel
from omnispeech.layers.packing import Scheme
from omnispeech.models.flow import Flow
from omnispeech.models.hift import HiFT
from omnispeech.models.omnispeech import OmniSpeechConfig
from omnispeech.models.qwen3 import Qwen3Config

CPU = torch.device("cpu")
PARTS = {
    "audio_encoder_model": "audio encoder",
    "audio_adapter": "audio adapter",
    "llm_model": "LLM",
    "llm2tts": "speech LM",  # it reads the states of the LLM through these two
    "llm_ln": "speech LM",
    "tts_lm_model": "speech LM",
}


def models_size(sources: Sources, target: Target) -> int:
    """Bytes of all that `load_sources` loads."""
    return sum(weight_sizes(sources, target).values()) + decoder_size(sources.decoder)


def weight_sizes(sources: Sources, target: Target) -> dict[str, int]:
    """Bytes of each part of the model of `sources`, as they lie in memory after loading.

    Raises CheckpointError for what is missing, damaged or does not fit, as loading does.
    """
    pairs = zip(LANGUAGE_MODELS, (sources.llm, sources.speech_lm), strict=True)
    others = {name: path for name, path in pairs if path is not None}
    whole, *replaced = plan_opens2s(sources.base, CPU, others, sources.wavlm)
    sizes: Counter[str] = Counter()
    for name, size in _held(whole, target):
        if (part := name.partition(".")[0]) not in others:
            sizes[PARTS.get(part, part)] += size
    for part, plan in zip(others, replaced, strict=True):
        sidecar = others[part] / SALIENT
        sizes[PARTS[part]] += sum(size for _, size in _held(plan, target))
        sizes[PARTS[part]] += sidecar.stat().st_size if sidecar.exists() else 0
    return dict(sizes)


def encoder_size(directory: Path, target: Target) -> int:
    """Bytes of the audio encoder and the adapter of an OpenS2S directory."""
    sizes = weight_sizes(Sources(base=directory, decoder=directory), target)
    return sizes["audio encoder"] + sizes["audio adapter"]


def decoder_size(directory: Path) -> int:
    """Bytes of both networks in float32, which they are on every device."""
    flow, hift = read_config(directory / "config.yaml")
    networks = (build_on_meta(lambda: Flow(flow)), build_on_meta(lambda: HiFT(hift)))
    return sum(_size(network, torch.float32) for network in networks)


def cache_sizes(directory: Path, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the KV cache of each language model; directory: of the whole model."""
    config = read_model_config(directory)
    configs: Mapping[str, Qwen3Config] = {"LLM": config.llm, "speech LM": config.tts_lm}
    return {
        f"KV cache of the {part}": 2  # keys and values
        * lm.num_hidden_layers
        * tokens
        * lm.num_key_value_heads
        * lm.head_dim
        * dtype.itemsize
        for part, lm in configs.items()
    }


def read_model_config(directory: Path) -> OmniSpeechConfig:
    return OmniSpeechConfig.from_dict(read_json(directory / "config.json"))


def _held(plan: WeightPlan, target: Target) -> Iterator[tuple[str, int]]:
    """(name in the model, bytes) of everything that the plan fills."""
    for name, tensor in plan.model.state_dict().items():
        module, _, suffix = name.rpartition(".")
        if plan.quantization and suffix == "weight" and module in plan.quantized:
            yield name, _packed_size(plan.quantization.scheme, tensor.shape, target.kernel)
        elif name not in plan.tied:  # else the memory of the embedding
            yield name, tensor.numel() * target.dtype.itemsize


def _packed_size(scheme: Scheme, shape: torch.Size, kernel: str) -> int:
    """shape [N, K]; of the form that the kernel computes with, see `layers/linear.py`."""
    n, k = shape
    columns = scheme.columns(k)
    codes = n * k // 2 if scheme.bits == 4 else n * k
    if known_kernel(kernel) == "reference":
        return codes + 3 * n * (k // columns)  # zero point and scale
    if scheme.bits == 4:
        columns = next((size for size in GROUP_SIZES if columns % size == 0), columns)
        return codes + 4 * n * (k // columns)  # scale and offset
    return codes + 2 * n * (k // columns)


def _size(network: nn.Module, dtype: torch.dtype) -> int:
    return sum(tensor.numel() for tensor in network.state_dict().values()) * dtype.itemsize
