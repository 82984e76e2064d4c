"""Writes a small OpenS2S checkpoint of random weights, steered so that its replies are words."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from omnispeech.checkpoint.files import build_on_meta
from omnispeech.models.omnispeech import OmniSpeech, OmniSpeechConfig
from omnispeech.prompt import AUDIO_END, AUDIO_START, SPEECH_END, SPEECH_START
from omnispeech.tiny.shape import LanguageShape, TinyShape
from omnispeech.tiny.tokenizer import (
    END_OF_TEXT,
    END_OF_TURN,
    id_of,
    train_words,
    write_json,
    write_tokenizer,
)
from omnispeech.tiny.weights import random_weights

PLAIN_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ,.?!'")
STEADY = 3.0  # value of the channel that every embedding shares, see `_steer`
SPREAD = 2.0  # standard deviation of the logits: neither one token only nor all alike
UNLIKELY = -12.0  # logit that is never sampled


def write_opens2s(directory: Path, seed: int, shape: TinyShape) -> None:
    written = write_settings(directory, shape, train_words(shape.merges))
    model = build_on_meta(lambda: OmniSpeech(OmniSpeechConfig.from_dict(written.config)))
    weights = random_weights(model, seed, torch.bfloat16)
    text_wishes = _text_wishes(written.text, shape.text_length)
    _steer(weights, "llm_model.", shape.llm.layers, text_wishes)
    _steer(weights, "tts_lm_model.", shape.speech.layers, _speech_wishes(written.speech, shape))
    _steer_bridge(weights)
    write_shards(directory, weights, shape.shards)


@dataclass(frozen=True, slots=True)
class Settings:
    """What of a checkpoint is not weights, as it was written."""

    config: dict[str, Any]
    text: Tokenizer
    speech: Tokenizer


def write_settings(directory: Path, shape: TinyShape, words: Tokenizer) -> Settings:
    """Every file but the weights; `words` has no added tokens yet."""
    control = (AUDIO_START, AUDIO_END, SPEECH_START, SPEECH_END)
    text = write_tokenizer(directory, words, control, control)
    units = [f"<|audio_{unit}|>" for unit in range(shape.units)]
    speech = write_tokenizer(directory / "tts", words, units, units[-1:])
    write_json(directory / "generation_config.json", _generation(text))
    write_json(
        directory / "tts" / "generation_config.json",
        _generation(speech) | {"max_new_tokens": shape.unit_limit},
    )
    (directory / "audio").mkdir(exist_ok=True)
    write_json(directory / "audio" / "preprocessor_config.json", _preprocessor(shape.segment_s))
    config = _config(shape, text, speech)
    write_json(directory / "config.json", config)
    return Settings(config, text, speech)


def _preprocessor(segment_s: int) -> dict[str, Any]:
    return {
        "chunk_length": segment_s,
        "dither": 0.0,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128,
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": 16000 * segment_s,
        "nb_max_frames": 100 * segment_s,
        "padding_side": "right",
        "padding_value": 0.0,
        "processor_class": "Qwen2AudioProcessor",
        "return_attention_mask": True,
        "sampling_rate": 16000,
    }


def _generation(tokenizer: Tokenizer) -> dict[str, Any]:
    end_of_text = id_of(tokenizer, END_OF_TEXT)
    return {
        "bos_token_id": end_of_text,
        "do_sample": True,
        "eos_token_id": [id_of(tokenizer, END_OF_TURN), end_of_text],
        "pad_token_id": end_of_text,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "4.51.0",
    }


def _config(shape: TinyShape, text: Tokenizer, speech: Tokenizer) -> dict[str, Any]:
    return {
        "adapter_inner_dim": shape.adapter_inner,
        "architectures": ["OmniSpeechModel"],
        "audio_encoder_config": {
            "_attn_implementation_autoset": True,
            "activation_dropout": 0.0,
            "activation_function": "gelu",
            "attention_dropout": 0.0,
            "d_model": shape.encoder_width,
            "dropout": 0.0,
            "encoder_attention_heads": shape.encoder_heads,
            "encoder_ffn_dim": shape.encoder_inner,
            "encoder_layerdrop": 0.0,
            "encoder_layers": shape.encoder_layers,
            "max_source_positions": 50 * shape.segment_s,
            "model_type": "qwen2_audio_encoder",
            "num_hidden_layers": shape.encoder_layers,
            "num_mel_bins": 128,
            "scale_embedding": False,
        },
        "conv_kernel_sizes": "5,5",
        "interleave_strategy": "4:8",
        "llm_config": _language_config(shape.llm, text),
        "lora_config": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "tts_lm_config": _language_config(shape.speech, speech),
    }


def _language_config(shape: LanguageShape, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": id_of(tokenizer, END_OF_TEXT),
        "eos_token_id": id_of(tokenizer, END_OF_TURN),
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.inner,
        "max_position_embeddings": shape.context,
        "max_window_layers": shape.layers,
        "model_type": "qwen3",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": tokenizer.get_vocab_size(),
    }


def _text_wishes(tokenizer: Tokenizer, length: int) -> Tensor:
    """[V]: plain words, and every so often the end."""
    tokens = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
    wanted = [i for i, token in enumerate(tokens) if token and PLAIN_LETTERS.issuperset(token)]
    return _wishes(tokenizer, wanted, length)


def _speech_wishes(tokenizer: Tokenizer, shape: TinyShape) -> Tensor:
    """[V]: units, and every so often the end."""
    first = id_of(tokenizer, "<|audio_0|>")
    return _wishes(tokenizer, range(first, first + shape.units), shape.speech_tail)


def _wishes(tokenizer: Tokenizer, wanted: Sequence[int], length: int) -> Tensor:
    wishes = torch.full((tokenizer.get_vocab_size(),), UNLIKELY)
    wishes[list(wanted)] = 0.0
    mass = len(wanted) * math.exp(SPREAD**2 / 2)  # of all that is wanted, before the softmax
    wishes[id_of(tokenizer, END_OF_TURN)] = math.log(mass / length)
    return wishes


def _steer(weights: dict[str, Tensor], prefix: str, layers: int, wishes: Tensor) -> None:
    """Adds `wishes` to the logits of a random language model, which has no biases of its own.

    Channel 0 carries the same value at every position: nothing is written into it on the way.
    """
    weights[f"{prefix}model.embed_tokens.weight"][:, 0] = STEADY
    weights[f"{prefix}model.norm.weight"][0] = 1.0
    for name, weight in weights.items():
        if name.startswith(prefix) and name.endswith(("o_proj.weight", "down_proj.weight")):
            weight *= math.sqrt(2 / layers)  # deeper is not louder: the final norm sees the same
            weight[0] = 0.0
    head = weights[f"{prefix}lm_head.weight"]
    head *= SPREAD
    head[wishes.argmax()] = 0.0  # the end is as likely at every position, so that it comes
    head[:, 0] = wishes / STEADY


def _steer_bridge(weights: dict[str, Tensor]) -> None:
    """What the speech LM reads beside its own units has the steady channel as well."""
    for name in ("llm_ln", "tts_lm_model.spk_ln"):
        weights[f"{name}.weight"][0] = 0.0
        weights[f"{name}.bias"][0] = STEADY


def write_shards(directory: Path, weights: dict[str, Tensor], count: int) -> None:
    """The weights in files of about one size, and the index of them."""
    total = sum(tensor.nbytes for tensor in weights.values())
    shards = [shard for shard in _shards(weights, total / count) if shard]
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors lets only the owner read
        places |= dict.fromkeys(shard, file)
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))},
    )


def _shards(weights: dict[str, Tensor], size: float) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if sum(t.nbytes for t in shard.values()) >= size:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard
