"""A models directory -> everything a conversation needs, on one device."""

import logging
import re
from pathlib import Path

import torch

from omnispeech.audio.features import MelConfig
from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.checkpoint.opens2s import LoadedOpenS2S, load_opens2s
from omnispeech.engine.runner import LanguageModels, Models
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.prompt import PromptBuilder, UnitVocabulary

logger = logging.getLogger(__name__)

OPENS2S, DECODER = "OpenS2S", "glm-4-voice-decoder"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str) -> torch.device:
    """auto: the first GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise ConfigError(f"--device {name!r} is no device; allowed: auto, cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu, or install a torch build for your GPU"
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of the language models and the audio encoder; auto: bf16 on a GPU, fp32 on a CPU."""
    if name == "auto":
        name = "fp32" if device.type == "cpu" else "bf16"
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def check_models(directory: Path) -> None:
    """Fails at the door, before anything is started."""
    if directory.name in (OPENS2S, DECODER) and (directory.parent / OPENS2S).is_dir():
        raise CheckpointError(f"{directory} is one level too deep; use --models {directory.parent}")
    for name in (OPENS2S, DECODER):
        if not (directory / name).is_dir():
            raise CheckpointError(
                f"{directory / name} is missing; point --models or OMNISPEECH_MODELS at a models "
                f"directory, or make a small random one with: omnispeech tiny {directory}"
            )


def load_models(
    directory: Path, device: torch.device, dtype: torch.dtype, *, compatible: bool = False
) -> Models:
    """Everything under `directory`; the speech decoder is float32 whatever `dtype` is."""
    check_models(directory)
    path = directory / OPENS2S
    loaded = load_opens2s(path, device, dtype)
    decoder = load_decoder(directory / DECODER, device)
    language = language_models(path, loaded, compatible=compatible)
    if language.units.count > decoder.flow.config.vocab_size:
        raise CheckpointError(
            f"{path} speaks {language.units.count} units, {directory / DECODER} knows "
            f"{decoder.flow.config.vocab_size}; they do not belong together"
        )
    logger.info("%s on %s in %s, %s in torch.float32", path, device, dtype, directory / DECODER)
    return Models(language, decoder)


def language_models(
    path: Path, loaded: LoadedOpenS2S, *, compatible: bool = False
) -> LanguageModels:
    """Tokenizers, limits and end ids of an OpenS2S directory beside its loaded weights."""
    text, speech = loaded.text_generation, loaded.speech_generation
    units = UnitVocabulary.from_directory(path / "tts")
    _check_units(path, units, loaded.model.config.tts_lm.vocab_size)
    assert speech.max_new_tokens is not None  # the loader puts the original's default there
    return LanguageModels(
        lm=loaded.model,
        prompt=PromptBuilder.from_directory(path, compatible=compatible),
        units=units,
        mel=MelConfig.from_dict(loaded.preprocessor),
        text_end=frozenset(text.eos_ids),
        speech_end=frozenset(speech.eos_ids),
        text_top_k=text.top_k,
        speech_top_k=speech.top_k,
        unit_limit=speech.max_new_tokens,
    )


def _check_units(path: Path, units: UnitVocabulary, rows: int) -> None:
    """More rows than units are padding; fewer would fail in the middle of a reply."""
    if (needed := units.units_bias + units.count) > rows:
        raise CheckpointError(
            f"{path / 'tts'} names units up to id {needed - 1}, the speech model of {path} has "
            f"{rows} rows; they do not belong together"
        )
