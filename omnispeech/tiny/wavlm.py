"""Writes a small WavLM of random weights, in the format of wavlm-base-plus."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnispeech.checkpoint.files import build_on_meta
from omnispeech.models.wavlm import WavLMConfig, WavLMEncoder
from omnispeech.tiny.tokenizer import write_json
from omnispeech.tiny.weights import random_tensor, random_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class WavLMShape:
    """The published sizes stand behind the defaults; kernels and strides are the published ones."""

    conv_width: int = 32  # 512
    hidden: int = 64  # 768
    inner: int = 128  # 3072
    layers: int = 2  # 12
    heads: int = 4  # 12
    position_kernel: int = 16  # 128


PREPROCESSOR = {
    "do_normalize": False,
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": 16000,
}


def write_wavlm(directory: Path, seed: int, shape: WavLMShape) -> None:
    """`config.json`, `preprocessor_config.json` and `pytorch_model.bin`, a pickle as published."""
    config = _config(shape)
    write_json(directory / "config.json", config)
    write_json(directory / "preprocessor_config.json", PREPROCESSOR)
    encoder = build_on_meta(lambda: WavLMEncoder(WavLMConfig(body=config)))
    assert isinstance(encoder, WavLMEncoder)
    weights = random_weights(encoder.wavlm, seed, torch.float32)
    weights["masked_spec_embed"] = random_tensor("mask", torch.Size([shape.hidden]), seed)
    torch.save(with_weight_norm(weights), directory / "pytorch_model.bin")


def with_weight_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The convolution of the positions is published as direction and length of each tap."""
    name = "encoder.pos_conv_embed.conv.weight"
    weight = weights[name]
    length = weight.norm(dim=(0, 1), keepdim=True)  # [1, 1, K]
    others = {n: value for n, value in weights.items() if n != name}
    return {**others, f"{name}_g": length, f"{name}_v": weight}


def _config(shape: WavLMShape) -> dict[str, Any]:
    return {
        "add_adapter": False,
        "architectures": ["WavLMModel"],
        "conv_bias": False,
        "conv_dim": [shape.conv_width] * 7,
        "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
        "conv_stride": [5, 2, 2, 2, 2, 2, 2],
        "do_stable_layer_norm": False,
        "feat_extract_activation": "gelu",
        "feat_extract_norm": "group",
        "hidden_act": "gelu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "layer_norm_eps": 1e-05,
        "max_bucket_distance": 800,
        "model_type": "wavlm",
        "num_attention_heads": shape.heads,
        "num_buckets": 320,
        "num_conv_pos_embedding_groups": 16,
        "num_conv_pos_embeddings": shape.position_kernel,
        "num_feat_extract_layers": 7,
        "num_hidden_layers": shape.layers,
        "torch_dtype": "float32",
        "transformers_version": "4.13.0",
    }
