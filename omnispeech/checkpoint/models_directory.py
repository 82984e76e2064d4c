"""What lies in a models directory, and which of it a start uses.

A quantized directory counts when it is entered in the manifest and as it was entered. One that is
not is an error, never a reason to take another precision.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.opens2s import plan_opens2s
from omnispeech.checkpoint.quantized import plan_causal_lm
from omnispeech.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

OPENS2S, DECODER, EIGHT_BIT = "OpenS2S", "glm-4-voice-decoder", "OpenS2S-8bit"
LLMS = {"awq": "OpenS2S-llm-awq", "gptq": "OpenS2S-llm-gptq"}
SPEECH_LMS = {"awq": "OpenS2S-speech-lm-awq"}
COMMANDS = {
    "OpenS2S-llm-awq": "python quantize_llm_awq.py",
    "OpenS2S-llm-gptq": "python quantize_llm_awq.py --gptq",
    "OpenS2S-8bit": "python quantize_model_once.py",
    "OpenS2S-speech-lm-awq": "python quantize_llm_awq.py --part speech_lm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Directories that a start reads."""

    base: Path  # OpenS2S, or OpenS2S-8bit
    decoder: Path
    llm: Path | None = None  # in place of the LLM in base
    speech_lm: Path | None = None  # in place of the speech LM in base


def choose_sources(directory: Path, llm: str = "auto", speech_lm: str = "bf16") -> Sources:
    """Which directories to load from `directory`; raises CheckpointError for what is not whole.

    llm: bf16, awq, gptq, 8bit, or auto: the first of awq, gptq, 8bit and bf16 that is there.
    speech_lm: awq, or bf16: the one that the model of the LLM brings.
    """
    if directory.name in (OPENS2S, DECODER) and (directory.parent / OPENS2S).is_dir():
        raise CheckpointError(f"{directory} is one level too deep; use --models {directory.parent}")
    if speech_lm not in ("bf16", *SPEECH_LMS):
        raise ConfigError(f"--speech-lm {speech_lm!r}; allowed: bf16, {', '.join(SPEECH_LMS)}")
    _tell_leftovers(directory)
    base, chosen = choose_llm(directory, llm)
    speech = _verified(directory, SPEECH_LMS[speech_lm]) if speech_lm in SPEECH_LMS else None
    return Sources(base=base, decoder=_need(directory, DECODER), llm=chosen, speech_lm=speech)


def choose_llm(directory: Path, name: str) -> tuple[Path, Path | None]:
    """The directory of the whole model, and that of an LLM to take in place of its own."""
    known = (*LLMS, "8bit", "bf16")
    if name not in ("auto", *known):
        raise ConfigError(f"--llm {name!r}; allowed: auto, {', '.join(known)}")
    chosen = _best(directory) if name == "auto" else name
    if chosen in LLMS:
        llm = _verified(directory, LLMS[chosen])
        return _base(directory), llm
    if chosen == "8bit":
        return _eight_bit(directory), None
    original = _original(directory)
    logger.info("Using original model: %s", original)
    if name == "auto":
        logger.info("No AWQ-quantized LLM found; tip: make one with: %s", COMMANDS[LLMS["awq"]])
    return original, None


def _best(directory: Path) -> str:
    """By what is there: whether it is whole is asked of the one that is taken."""
    there = {"8bit": EIGHT_BIT, **LLMS}
    return next((n for n in (*LLMS, "8bit") if os.path.lexists(directory / there[n])), "bf16")


def _base(directory: Path) -> Path:
    """The model around a quantized LLM: the original, or if that was deleted, the 8-bit one."""
    if not (directory / OPENS2S).exists() and (directory / EIGHT_BIT).exists():
        return _eight_bit(directory)
    return _original(directory)


def _eight_bit(directory: Path) -> Path:
    path = _verified(directory, EIGHT_BIT)
    logger.info("Using pre-quantized model: %s", path)
    return path


def _original(directory: Path) -> Path:
    if not (directory / OPENS2S).is_dir() and (directory / EIGHT_BIT).is_dir():
        raise CheckpointError(
            f"{directory / OPENS2S} is missing; {EIGHT_BIT} is there: use --llm 8bit or auto, "
            "or fetch the original again"
        )
    return _need(directory, OPENS2S)


def _need(directory: Path, name: str) -> Path:
    if not (directory / name).is_dir():
        raise CheckpointError(
            f"{directory / name} is missing; point --models or OMNISPEECH_MODELS at a models "
            f"directory, or make a small random one with: omnispeech tiny {directory}"
        )
    return directory / name


def _verified(directory: Path, name: str) -> Path:
    """A quantized directory, if it is as it was when it was finished, or holds equal bytes."""
    if not (directory / name).is_dir():
        raise CheckpointError(f"{directory / name} is missing; make it with: {COMMANDS[name]}")
    try:
        _check(Manifest(directory), name)
    except CheckpointError as exc:
        raise CheckpointError(
            f"{exc} (to check: omnispeech verify --models {directory} {name}; to make it again: "
            f"{COMMANDS[name]} --overwrite)"
        ) from exc
    return directory / name


def _check(manifest: Manifest, name: str) -> None:
    """Quickly, and where that finds a difference, as after copying, by every byte."""
    try:
        manifest.check(name)
    except CheckpointError as exc:
        logger.info("%s", exc)
        logger.info("comparing every byte of %s", name)
        manifest.check(name, deep=True)


def _tell_leftovers(directory: Path) -> None:
    for path in sorted(directory.glob("*.partial")):
        logger.info("%s is not finished and not used", path)


def verify(directory: Path, names: list[str], *, deep: bool = False) -> Iterator[tuple[str, str]]:
    """Checks directories of a models directory; yields the name and what is wrong, or "".

    names: none for all that are entered or were quantized. A quantized one that is not entered is
    entered if its headers fit. deep: every byte is compared; without it only if a quick look finds
    a difference, as after copying.
    """
    quantized = [name for name in COMMANDS if (directory / name).is_dir()]
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no models directory; use --models")
    given = [name.rstrip("/") for name in names]  # as a shell completes them
    for name in given or sorted({*Manifest(directory).names(), *quantized}):
        try:
            _verify(directory, name, deep=deep)
            yield name, ""
        except CheckpointError as exc:
            again = f" (to make it again: {COMMANDS.get(name)} --overwrite)"
            yield name, f"{exc}{again if name in COMMANDS else ''}"


def _verify(directory: Path, name: str, *, deep: bool) -> None:
    manifest = Manifest(directory)
    if name not in manifest.names():
        _check_headers(directory, name)
        manifest.enter(name, {"by": "omnispeech verify"})
        return
    if deep:
        manifest.check(name, deep=True)
    else:
        _check(manifest, name)


def _check_headers(directory: Path, name: str) -> None:
    """Raises CheckpointError unless all tensors of a quantized directory are there and fit."""
    path, cpu = directory / name, torch.device("cpu")
    if name not in COMMANDS or not path.is_dir():
        raise CheckpointError(
            f"{path} is not in the manifest, and no quantized model that could be entered; "
            f"known: {', '.join(COMMANDS)}"
        )
    plan = plan_opens2s(path, cpu)[0] if name == EIGHT_BIT else plan_causal_lm(path, cpu)
    if not plan.quantized:
        raise CheckpointError(f"{path} holds nothing quantized; make it with: {COMMANDS[name]}")
