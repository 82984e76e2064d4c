"""A models directory -> everything a conversation needs, on one device."""

import logging
import re
import time
from pathlib import Path

import torch

from omnispeech.audio.features import FrontEnd, MelConfig, Waveform
from omnispeech.checkpoint.decoder import decoder_files, load_decoder
from omnispeech.checkpoint.files import held_bytes, size_text
from omnispeech.checkpoint.models_directory import METHODS, Sources, check_units, choose_sources
from omnispeech.checkpoint.opens2s import LoadedOpenS2S, Loading, load_opens2s
from omnispeech.engine.runner import LanguageModels, Models
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.models.speech_decoder import SpeechDecoder
from omnispeech.models.wavlm import WavLMConfig
from omnispeech.prompt import PromptBuilder, UnitVocabulary

logger = logging.getLogger(__name__)

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


def load_models(
    directory: Path, device: torch.device, dtype: torch.dtype, *, compatible: bool = False
) -> Models:
    """Everything under `directory`, with the best LLM there."""
    return load_sources(choose_sources(directory), device, dtype, compatible=compatible)


def load_sources(
    sources: Sources,
    device: torch.device,
    dtype: torch.dtype,
    *,
    kernel: str = "auto",
    compatible: bool = False,
    loading: Loading | None = None,
) -> Models:
    """The speech decoder is float32 whatever `dtype` is. kernel: of quantized linears."""
    began = time.perf_counter()
    loading = loading or Loading()
    base, phases = sources.base, loading.phases
    loaded = load_opens2s(
        base,
        device,
        dtype,
        llm=sources.llm,
        speech_lm=sources.speech_lm,
        wavlm=sources.wavlm,
        kernel=kernel,
        loading=loading,
    )
    with phases.measure("load speech decoder") as phase:
        files = decoder_files(sources.decoder)  # before pickles among them are converted
        decoder = _load_decoder(sources.decoder, device)
        phase.size = sum(path.stat().st_size for path in files)
    with phases.measure("load tokenizers"):
        language = language_models(base, loaded, compatible=compatible)
    check_units(sources, language.units.count, decoder.flow.config.vocab_size)
    models = Models(language, decoder)
    _tell_total(models, sources, device, dtype, time.perf_counter() - began)
    return models


def _load_decoder(path: Path, device: torch.device) -> SpeechDecoder:
    began = time.perf_counter()
    decoder = load_decoder(path, device)
    size = held_bytes(decoder.flow) + held_bytes(decoder.hift)
    logger.info("speech decoder loaded (%s, %.1f s)", size_text(size), time.perf_counter() - began)
    return decoder


def _tell_total(
    models: Models, sources: Sources, device: torch.device, dtype: torch.dtype, seconds: float
) -> None:
    """Measured, on a GPU by its allocator, which knows of more than the weights."""
    if device.type == "cuda":
        what, size = "VRAM", torch.cuda.memory_allocated(device)
    else:
        modules = (models.language.lm, models.decoder.flow, models.decoder.hift)
        what, size = "memory of the weights", sum(map(held_bytes, modules))
    name = str(dtype).removeprefix("torch.")
    llm = f" with {METHODS[sources.llm.name].upper()}-quantized LLM" if sources.llm else ""
    total = f"{what}: {size_text(size)}{llm}"
    logger.info("Total %s, on %s in %s (%.1f s)", total, device, name, seconds)


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
        front_end=_front_end(loaded),
        text_end=frozenset(text.eos_ids),
        speech_end=frozenset(speech.eos_ids),
        text_top_k=text.top_k,
        speech_top_k=speech.top_k,
        unit_limit=speech.max_new_tokens,
    )


def _front_end(loaded: LoadedOpenS2S) -> FrontEnd:
    if isinstance(loaded.model.config.audio_encoder, WavLMConfig):
        return Waveform()
    return MelConfig.from_dict(loaded.preprocessor)


def _check_units(path: Path, units: UnitVocabulary, rows: int) -> None:
    """More rows than units are padding; fewer would fail in the middle of a reply."""
    if (needed := units.units_bias + units.count) > rows:
        raise CheckpointError(
            f"{path / 'tts'} names units up to id {needed - 1}, the speech model of {path} has "
            f"{rows} rows; they do not belong together"
        )
