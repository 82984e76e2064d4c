"""Loads an OpenS2S checkpoint directory: everything in it fits exactly, or an error says what."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from omnispeech.checkpoint.files import assign_weights, build_on_meta, check_weights
from omnispeech.checkpoint.lora import MergedLora, has_lora
from omnispeech.checkpoint.shards import Shards, TensorFiles
from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json
from omnispeech.models.omnispeech import OmniSpeech, OmniSpeechConfig
from omnispeech.models.qwen3 import Qwen3Config

NEEDED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "audio/preprocessor_config.json",
    "tts/tokenizer.json",
)
UNIT_LIMIT = 512  # of one reply where the checkpoint sets none: about 41 s of speech


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a request does not set itself; an absent key means the default of transformers 4.51."""

    eos_ids: tuple[int, ...]
    top_k: int = 50  # 0: off
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedOpenS2S:
    model: OmniSpeech
    preprocessor: dict[str, Any]  # audio/preprocessor_config.json as it is
    text_generation: GenerationDefaults
    speech_generation: GenerationDefaults


def load_opens2s(directory: Path, device: torch.device, dtype: torch.dtype) -> LoadedOpenS2S:
    """The whole model on `device`, its floating point weights cast to `dtype`."""
    _check_files(directory)
    raw = read_json(directory / "config.json")
    config = OmniSpeechConfig.from_dict(raw)
    preprocessor = read_json(directory / "audio/preprocessor_config.json")
    _check_segments(preprocessor, config)
    text = read_generation(directory / "generation_config.json", raw["llm_config"])
    speech = read_generation(
        directory / "tts/generation_config.json", raw["tts_lm_config"], limit=UNIT_LIMIT
    )
    _check_end_ids(directory / "generation_config.json", text, config.llm)
    _check_end_ids(directory / "tts/generation_config.json", speech, config.tts_lm)
    return LoadedOpenS2S(
        model=_load_model(directory, raw, config, device, dtype),
        preprocessor=preprocessor,
        text_generation=text,
        speech_generation=speech,
    )


def read_generation(
    path: Path, nested: Mapping[str, Any], *, limit: int | None = None
) -> GenerationDefaults:
    """`nested`: the config of the same language model, asked for end ids that `path` lacks.

    `limit` is max_new_tokens where the file has none. The file itself may be absent.
    """
    raw = read_json(path) if path.exists() else {}
    eos = raw.get("eos_token_id", nested.get("eos_token_id"))
    if eos is None:
        raise CheckpointError(
            f"no eos_token_id in {path}, nor in the nested config; nothing would end a reply"
        )
    return GenerationDefaults(
        eos_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        top_k=_absent_or_null(raw, "top_k", 50, null=0),
        max_new_tokens=_absent_or_null(raw, "max_new_tokens", limit, null=limit),
    )


def _check_end_ids(path: Path, generation: GenerationDefaults, lm: Qwen3Config) -> None:
    for end in generation.eos_ids:
        if end not in range(lm.vocab_size):
            raise CheckpointError(
                f"end id {end!r} of {path} (or of config.json, if that file names none) is not "
                f"in the vocabulary; allowed: 0 to {lm.vocab_size - 1}"
            )


def _absent_or_null(raw: Mapping[str, Any], name: str, absent: Any, *, null: Any) -> Any:
    value = raw.get(name, absent)
    return null if value is None else value


def _check_files(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; it should hold an OpenS2S model")
    if missing := [name for name in NEEDED if not (directory / name).is_file()]:
        raise CheckpointError(
            f"{directory} is not a whole OpenS2S checkpoint; it lacks {', '.join(missing)}"
        )


def _check_segments(preprocessor: Mapping[str, Any], config: OmniSpeechConfig) -> None:
    """The features must fit the audio encoder; better known now than at the first audio."""
    encoder = config.audio_encoder
    chunk = preprocessor.get("chunk_length", 30) * preprocessor.get("sampling_rate", 16_000)
    frames = chunk // preprocessor.get("hop_length", 160)
    if frames % (2 * encoder.max_source_positions):
        raise CheckpointError(
            f"a chunk of the preprocessor is {frames} mel frames; it must be a multiple of the "
            f"{2 * encoder.max_source_positions} that the audio encoder takes at a time"
        )
    if (bins := preprocessor.get("feature_size", 80)) != encoder.num_mel_bins:
        raise CheckpointError(
            f"feature_size={bins} of the preprocessor differs from "
            f"num_mel_bins={encoder.num_mel_bins} of the audio encoder"
        )


def _load_model(
    directory: Path,
    raw: Mapping[str, Any],
    config: OmniSpeechConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> OmniSpeech:
    model = cast(OmniSpeech, build_on_meta(lambda: OmniSpeech(config)))
    tensors = _open(directory, raw, device)
    tied = _tied_heads(config, tensors)
    shapes = {name: tensors.shape(name) for name in tensors.names}
    # The headers tell whether all fits: a misfit is not found after reading 22 GB.
    check_weights(model, shapes | {head: shapes[e] for head, e in tied.items()}, str(directory))
    weights = {name: tensors.read(name, device, dtype) for name in tensors.names}
    assign_weights(model, weights | {head: weights[e] for head, e in tied.items()}, str(directory))
    return model


def _open(directory: Path, raw: Mapping[str, Any], device: torch.device) -> TensorFiles:
    shards = Shards(directory, device)
    if not has_lora(shards.names):
        return shards
    if not raw.get("lora_config"):
        raise CheckpointError(
            f"{directory} holds LoRA tensors, but its config.json has no lora_config; "
            "r and lora_alpha are needed to merge them"
        )
    return MergedLora(shards, raw["lora_config"])


def _tied_heads(config: OmniSpeechConfig, tensors: TensorFiles) -> dict[str, str]:
    """Heads to take from the embedding: {head: embedding}.

    Only where no head is stored. The original uses a stored head whatever the flag says.
    """
    pairs = {
        f"{lm}.lm_head.weight": f"{lm}.model.embed_tokens.weight"
        for lm, settings in (("llm_model", config.llm), ("tts_lm_model", config.tts_lm))
        if settings.tie_word_embeddings
    }
    return {
        head: embedding
        for head, embedding in pairs.items()
        if head not in tensors.names and embedding in tensors.names
    }
