"""What lies in a models directory, and which of it a start uses.

A quantized directory counts when it is entered in the manifest and as it was entered. One that is
not is an error, never a reason to take another precision.
"""

import logging
import os
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from omnispeech.checkpoint.manifest import Manifest, Touched
from omnispeech.checkpoint.wavlm_paths import BRIDGE, WAVLM, WavLMPaths, is_wavlm, wavlm_paths
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.json_file import read_json

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
SMALL = "omnispeech small"  # in the manifest: what made it
METHODS = {
    "OpenS2S-llm-awq": "awq",
    "OpenS2S-llm-gptq": "gptq",
    "OpenS2S-8bit": "int8",
    "OpenS2S-speech-lm-awq": "awq",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Directories that a start reads."""

    base: Path  # OpenS2S, or OpenS2S-8bit
    decoder: Path
    llm: Path | None = None  # in place of the LLM in base
    speech_lm: Path | None = None  # in place of the speech LM in base
    wavlm: WavLMPaths | None = None  # in place of the audio encoder in base


def choose_sources(
    directory: Path,
    llm: str = "auto",
    speech_lm: str = "bf16",
    audio_encoder: str = "checkpoint",
    coming: Collection[str] = (),
) -> Sources:
    """Which directories to load from `directory`; raises CheckpointError for what is not whole.

    llm: bf16, awq, gptq, 8bit, or auto: the first of awq, gptq, 8bit and bf16 that is there.
    speech_lm: awq, or bf16: the one that the model of the LLM brings.
    audio_encoder: wavlm, or checkpoint: the one of the model of the LLM.
    coming: names of directories that will be there before they are read.
    """
    check_level(directory)
    if speech_lm not in ("bf16", *SPEECH_LMS):
        raise ConfigError(f"--speech-lm {speech_lm!r}; allowed: bf16, {', '.join(SPEECH_LMS)}")
    _tell_leftovers(directory)
    base, chosen = choose_llm(directory, llm, coming)
    speech = _verified(directory, SPEECH_LMS[speech_lm]) if speech_lm in SPEECH_LMS else None
    return Sources(
        base=base,
        decoder=_need(directory, DECODER, coming),
        llm=chosen,
        speech_lm=speech,
        wavlm=_choose_wavlm(directory, base, audio_encoder, coming),
    )


def check_level(directory: Path, way: str = "--models") -> None:
    """Raises CheckpointError for the directory of one model. way: see `check_place`."""
    place, names = directory.absolute(), (OPENS2S, DECODER, *METHODS)
    inside = any(os.path.lexists(place / name) for name in names)
    if place.name in names and place.is_dir() and not inside:
        above = shlex.quote(str(place.parent))
        raise CheckpointError(f"{place} is one level too deep; use {way} {above}")


def check_units(sources: Sources, spoken: int, known: int) -> None:
    """Raises CheckpointError where the decoder knows other units than the model speaks."""
    if spoken != known:
        raise CheckpointError(
            f"{sources.base} speaks {spoken} units, {sources.decoder} knows {known}; "
            "they do not belong together"
        )


def choose_llm(
    directory: Path, name: str, coming: Collection[str] = ()
) -> tuple[Path, Path | None]:
    """The directory of the whole model, and that of an LLM to take in place of its own."""
    known = (*LLMS, "8bit", "bf16")
    if name not in ("auto", *known):
        raise ConfigError(f"--llm {name!r}; allowed: auto, {', '.join(known)}")
    chosen = _best(directory) if name == "auto" else name
    if name == "auto" and chosen != "awq":
        logger.info("💡 No AWQ-quantized LLM found; tip: make one with: %s", COMMANDS[LLMS["awq"]])
    if chosen in LLMS:
        llm = _verified(directory, LLMS[chosen])
        return _base(directory, coming), llm
    if chosen == "8bit":
        return _eight_bit(directory), None
    original = _original(directory, coming)
    logger.info("Using original model: %s", original)
    return original, None


def _best(directory: Path) -> str:
    """By what is there: whether it is whole is asked of the one that is taken.

    Raises CheckpointError for one that was there: to take another precision needs a word.
    """
    entered = Manifest(directory).names()
    for choice, name in {**LLMS, "8bit": EIGHT_BIT}.items():
        if os.path.lexists(directory / name):
            return choice
        if name in entered:
            raise CheckpointError(
                f"{directory / name} is missing, but the manifest knows it; choose another with "
                f"--llm, make it again with: {make_command(directory / name)}, or let it go with: "
                f"omnispeech forget --models {shlex.quote(str(directory))} {name}"
            )
    return "bf16"


def _base(directory: Path, coming: Collection[str]) -> Path:
    """The model around a quantized LLM: the original, or if that was deleted, the 8-bit one."""
    if not (directory / OPENS2S).exists() and (directory / EIGHT_BIT).exists():
        return _eight_bit(directory)
    return _original(directory, coming)


def _eight_bit(directory: Path) -> Path:
    path = _verified(directory, EIGHT_BIT)
    logger.info("Using pre-quantized model: %s", path)
    return path


def _original(directory: Path, coming: Collection[str]) -> Path:
    missing = OPENS2S not in coming and not os.path.lexists(directory / OPENS2S)
    if missing and (directory / EIGHT_BIT).is_dir():
        raise CheckpointError(
            f"{directory / OPENS2S} is missing; {EIGHT_BIT} is there: use --llm 8bit or auto, "
            f"or bring the original with: {fetch_command(directory, OPENS2S)}"
        )
    parts = [name for name in (*LLMS.values(), *SPEECH_LMS.values()) if (directory / name).is_dir()]
    if missing and parts:
        raise CheckpointError(
            f"{directory / OPENS2S} is missing; {parts[0]} is one language model and still needs "
            "the audio encoder, the adapters and the other language model from there; bring it "
            f"with: {fetch_command(directory, OPENS2S)}"
        )
    return _need(directory, OPENS2S, coming)


def _need(directory: Path, name: str, coming: Collection[str]) -> Path:
    if name not in coming and not is_there(directory / name):
        raise CheckpointError(
            f"{directory / name} is missing; point --models or OMNISPEECH_MODELS at a models "
            f"directory, bring it with: {fetch_command(directory, name)}, or begin with the small "
            f"model that comes with omnispeech: {small_command(directory)}"
        )
    return directory / name


def _verified(directory: Path, name: str) -> Path:
    """A quantized directory, if it is as it was when it was finished, or holds equal bytes."""
    if not is_there(directory / name):
        command = make_command(directory / name)
        raise CheckpointError(f"{directory / name} is missing; make it with: {command}")
    manifest = Manifest(directory)
    manifest.names()  # what is wrong with the manifest itself is no matter of one model
    try:
        check(manifest, name)
    except CheckpointError as exc:
        raise CheckpointError(
            f"{exc} (to check: {verify_command(directory, name)}; to make it again: "
            f"{make_command(directory / name)} --overwrite)"
        ) from exc
    check_method(directory / name)
    return directory / name


def _choose_wavlm(
    directory: Path, base: Path, audio_encoder: str, coming: Collection[str]
) -> WavLMPaths | None:
    if audio_encoder not in ("checkpoint", "wavlm"):
        raise ConfigError(f"--audio-encoder {audio_encoder!r}; allowed: checkpoint, wavlm")
    if audio_encoder == "checkpoint" and not is_wavlm(base):
        return None
    paths = wavlm_paths(directory, base)
    if paths.body and WAVLM not in coming and not is_there(paths.body):
        raise CheckpointError(
            f"{paths.body} is missing; bring it with: {fetch_command(directory, WAVLM)}"
        )
    if paths.bridge:
        _check_bridge(directory, paths.bridge, base)
    logger.info("Using WavLM: %s", paths.body or base)
    return paths


def _check_bridge(directory: Path, path: Path, base: Path) -> None:
    """Without trained layers between them one network is noise to the other."""
    command = train_command(directory)
    if not is_there(path):
        raise CheckpointError(
            f"{path} is missing: what WavLM makes of a sound means nothing to the audio adapter "
            f"of {base} until a bridge between them is trained, and the replies would be answers "
            f"to noise; train it with: {command}"
        )
    try:
        check(Manifest(directory), BRIDGE)
    except CheckpointError as exc:
        raise CheckpointError(f"{exc}{advice(path)}") from exc


def fetch_command(directory: Path, name: str) -> str:
    """What brings a directory of the models directory `directory`, or what it lacks."""
    return f"omnispeech fetch {name} --models {shlex.quote(str(directory))}"


def small_command(directory: Path) -> str:
    """What puts the small model into an empty models directory, or what it lacks."""
    return f"omnispeech small {shlex.quote(str(directory))}"


def small_anew(directory: Path) -> str:
    """How the small model takes the place of what is there, in words."""
    there = [str(path) for name in (OPENS2S, DECODER) if (path := directory / name).exists()]
    move = f"move {' and '.join(there)} away, then: " if there else ""
    return f"{move}{small_command(directory)}"


def made_by(path: Path) -> str:
    """What the manifest says about a directory; empty if it is not entered."""
    manifest = Manifest(path.parent)
    return manifest.entry(path.name).made.get("by", "") if path.name in manifest.names() else ""


def train_command(directory: Path) -> str:
    """What trains the bridge of the models directory `directory`."""
    return f"omnispeech train-bridge --models {shlex.quote(str(directory))}"


def verify_command(directory: Path, name: str) -> str:
    return f"omnispeech verify --models {shlex.quote(str(directory))} {name}"


def make_command(path: Path) -> str:
    """What makes a quantized directory."""
    return f"{COMMANDS[path.name]} --models {shlex.quote(str(path.parent))}"


def mending(directory: Path) -> str:
    """The command that makes or brings a directory again, in words; empty where there is none."""
    if made_by(directory) == SMALL:
        return f"to put the small model back: {small_anew(directory.parent)}"
    if directory.name in (OPENS2S, DECODER, WAVLM):
        return f"to mend it: {fetch_command(directory.parent, directory.name)}"
    if directory.name in COMMANDS:
        return f"to make it again: {make_command(directory)} --overwrite"
    if directory.name == BRIDGE:
        return f"to train it again: {train_command(directory.parent)} --overwrite"
    return ""


def bring_again(directory: Path) -> str:
    """What to do about a directory whose files are damaged."""
    return mending(directory) or "fetch it again"


def advice(directory: Path) -> str:
    """The same, to be put behind what is wrong."""
    return f" ({words})" if (words := mending(directory)) else ""


def nearest(path: Path) -> Path:
    """What is there of `path`: itself, or the first above it."""
    return next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))


def check_place(directory: Path, way: str = "--models") -> None:
    """Raises ConfigError or CheckpointError for what can become no models directory.

    way: to name another one: the flag or command that stands before it.
    """
    check_level(directory, way)
    if (place := nearest(directory)).is_dir():
        return
    link = f"a link to {place.readlink()}, and " if place.is_symlink() else ""
    raise ConfigError(f"{place} is {link}no directory; name a models directory: {way} DIR")


def is_there(path: Path) -> bool:
    """Raises CheckpointError for what is no directory, and for a link that leads nowhere."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to {path.readlink()}, which is not there")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is no directory; it should hold a model: move it away")
    return path.exists()


def check_method(path: Path) -> None:
    """Raises CheckpointError for weights that are not what the name of the directory says."""
    from omnispeech.checkpoint.quantized import read_quantization  # imports torch

    found = read_quantization(read_json(path / "config.json"))
    method = found.method if found else "not quantized"
    if method != METHODS[path.name]:
        raise CheckpointError(
            f"{path} should hold {METHODS[path.name]}, its config.json says {method}; "
            "to keep it, give the directory its right name"
        )


def check(manifest: Manifest, name: str) -> None:
    """By sizes and times; files of another time, as after copying, by every byte."""
    try:
        manifest.check(name)
    except Touched as exc:
        logger.info("%s", exc)
        logger.info("comparing every byte of %s that has another time", name)
        manifest.check_touched(name)


def _tell_leftovers(directory: Path) -> None:
    for path in sorted(directory.glob("*.partial")):
        logger.info("%s is not finished and not used", path)
