"""Writes small checkpoints of random weights, in every file as the published ones.

They are what a newcomer, the tests and the benchmark talk to when no trained model is at hand.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from omnispeech.checkpoint.files import build_on_meta
from omnispeech.checkpoint.tiny_decoder import DecoderShape, write_decoder
from omnispeech.checkpoint.tiny_tokenizer import (
    END_OF_TEXT,
    END_OF_TURN,
    id_of,
    train_words,
    write_json,
    write_tokenizer,
)
from omnispeech.checkpoint.tiny_weights import random_weights
from omnispeech.errors import CheckpointError
from omnispeech.models.omnispeech import OmniSpeech, OmniSpeechConfig
from omnispeech.prompt import AUDIO_END, AUDIO_START, SPEECH_END, SPEECH_START

OPENS2S, DECODER = "OpenS2S", "glm-4-voice-decoder"
PLAIN_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ,.?!'")
STEADY = 3.0  # value of the channel that every embedding shares, see `_steer`
SPREAD = 2.0  # standard deviation of the logits: neither one token only nor all alike
UNLIKELY = -12.0  # logit that is never sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageShape:
    hidden: int
    inner: int
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyShape:
    """Sizes of the networks; the defaults make about 3 MB."""

    encoder_width: int = 64
    encoder_inner: int = 128
    encoder_layers: int = 2
    encoder_heads: int = 4
    adapter_inner: int = 32
    llm: LanguageShape = LanguageShape(hidden=64, inner=128)
    speech: LanguageShape = LanguageShape(hidden=48, inner=96)  # not heads * head_width
    decoder: DecoderShape = field(default_factory=DecoderShape)
    merges: int = 300  # of the text tokenizer
    units: int = 512
    shards: int = 2
    text_length: int = 32  # tokens of a sampled reply, about, on average
    speech_tail: int = 24  # units after the text has ended, likewise
    unit_limit: int = 100  # of one reply: 8 s of speech


def write_tiny(directory: Path, seed: int = 0, shape: TinyShape | None = None) -> None:
    """`directory/OpenS2S` and `directory/glm-4-voice-decoder`, both whole or not there.

    The same seed and shape give the same bytes.
    """
    shape = shape or TinyShape()
    writers: dict[str, Callable[[Path], None]] = {
        OPENS2S: lambda path: write_opens2s(path, seed, shape),
        DECODER: lambda path: write_decoder(path, seed, shape.decoder, shape.units),
    }
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    for name in writers:
        _refuse_occupied(directory / name)
    directory.mkdir(parents=True, exist_ok=True)
    partial = {name: directory / f".{name}.{os.getpid()}.partial" for name in writers}
    try:
        for name, write in writers.items():
            partial[name].mkdir()
            write(partial[name])
            _sync(partial[name])
        for name, path in partial.items():
            os.replace(path, directory / name)
    finally:
        for path in partial.values():
            shutil.rmtree(path, ignore_errors=True)


def _refuse_occupied(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} is there already; name another directory, or delete it")


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def write_opens2s(directory: Path, seed: int, shape: TinyShape) -> None:
    words = train_words(shape.merges)
    control = (AUDIO_START, AUDIO_END, SPEECH_START, SPEECH_END)
    text = write_tokenizer(directory, words, control, control)
    units = [f"<|audio_{unit}|>" for unit in range(shape.units)]
    speech = write_tokenizer(directory / "tts", words, units, units[-1:])
    write_json(directory / "generation_config.json", _generation(text))
    write_json(
        directory / "tts" / "generation_config.json",
        _generation(speech) | {"max_new_tokens": shape.unit_limit},
    )
    (directory / "audio").mkdir()
    write_json(directory / "audio" / "preprocessor_config.json", PREPROCESSOR)
    config = _config(shape, text, speech)
    write_json(directory / "config.json", config)
    model = build_on_meta(lambda: OmniSpeech(OmniSpeechConfig.from_dict(config)))
    weights = random_weights(model, seed, torch.bfloat16)
    _steer(weights, "llm_model.", shape.llm.layers, _text_wishes(text, shape.text_length))
    _steer(weights, "tts_lm_model.", shape.speech.layers, _speech_wishes(speech, shape))
    _steer_bridge(weights)
    _write_shards(directory, weights, shape.shards)


PREPROCESSOR = {
    "chunk_length": 30,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 480000,
    "nb_max_frames": 3000,
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
            "max_source_positions": 1500,
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
        "max_position_embeddings": 40960,
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


def _write_shards(directory: Path, weights: dict[str, Tensor], count: int) -> None:
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
