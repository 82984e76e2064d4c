"""`omnispeech verify`: whether quantized models are what was made, and of the model beside them."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omnispeech.checkpoint.decoder import check_conversion
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import (
    COMMANDS,
    DECODER,
    EIGHT_BIT,
    OPENS2S,
    SPEECH_LMS,
    check,
    check_method,
    fetch_command,
    is_there,
    make_command,
)
from omnispeech.checkpoint.opens2s import plan_opens2s
from omnispeech.checkpoint.prepared import check_origin, prepared_entries
from omnispeech.checkpoint.quantized import plan_causal_lm
from omnispeech.checkpoint.wavlm_paths import BRIDGE
from omnispeech.download.models import MODELS
from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json
from omnispeech.layers.packing import Scheme
from omnispeech.models.speech_lm import SpeechLM
from omnispeech.quantization.report import JSON
from omnispeech.quantization.verify import StoredModel, check_digests
from omnispeech.quantization.whole_model import source_fingerprint

COMPARED = {"scheme", "kept", "digests"}  # keys of a report with which tensors can be compared


@dataclass(frozen=True, slots=True)
class Verdict:
    name: str
    whole: bool
    words: str


def verify(models: Path, names: Sequence[str], *, deep: bool = False) -> Iterator[Verdict]:
    """Checks directories of a models directory, one by one.

    names: none for all that are entered or were quantized. A quantized one that is not entered is
    entered if its headers fit and its tensors are those of its report. deep: every byte is
    compared; without it only if a quick look finds a difference, as after copying.
    """
    if not models.is_dir():
        raise CheckpointError(f"{models} is no models directory; use --models")
    entered = Manifest(models).names()
    quantized = [name for name in COMMANDS if (models / name).is_dir()]
    given = [name.rstrip("/") for name in names]  # as a shell completes them
    for name in given or sorted({*entered, *quantized}):
        try:
            yield Verdict(name, True, _verify(models, name, deep=deep))
        except CheckpointError as exc:
            yield Verdict(name, False, f"{exc}{_advice(models, name)}")


def _advice(models: Path, name: str) -> str:
    if name in COMMANDS:
        return f" (to make it again: {make_command(models / name)} --overwrite)"
    if name in MODELS:
        return f" (to bring what it lacks, and enter it: {fetch_command(models, name)})"
    if name == BRIDGE:
        place = shlex.quote(str(models))
        return f" (to train it again: omnispeech train-bridge --models {place} --overwrite)"
    return ""


def _verify(models: Path, name: str, *, deep: bool) -> str:
    """What was found; raises CheckpointError for what is wrong."""
    manifest = Manifest(models)
    if name not in manifest.names():
        return _enter(manifest, models, name)
    if name in (copies := prepared_entries(models)) and not is_there(models / name):
        return "gone; the next start that needs it makes it again"
    if not is_there(models / name):
        raise CheckpointError(
            f"{models / name} is missing; if it was deleted on purpose: "
            f"omnispeech forget --models {shlex.quote(str(models))} {name}"
        )
    if deep:
        manifest.check(name, deep=True)
        if name == DECODER:
            check_conversion(models / name)
    else:
        check(manifest, name)
    if name in copies:
        check_origin(models, name)
    if name in COMMANDS:
        check_method(models / name)
        _check_source(models, name, manifest.entry(name).made)
    return "whole"


def _enter(manifest: Manifest, models: Path, name: str) -> str:
    path = models / name
    _check_headers(path)
    made, words = (
        {"by": "omnispeech verify"},
        "entered: headers fit, no earlier record to compare with",
    )
    report = read_json(path / JSON) if (path / JSON).is_file() else {}
    if report.keys() >= COMPARED:
        stored = StoredModel(path, Scheme(**report["scheme"]), report["kept"])
        check_digests(stored, report["digests"], path)
        made |= report.get("signature", {})
        words = f"entered: every tensor is as its {JSON} says"
    _check_source(models, name, made)
    manifest.enter(name, made)
    return words


def _check_headers(path: Path) -> None:
    """Raises CheckpointError unless all tensors of a quantized directory are there and fit."""
    if path.name not in COMMANDS or not is_there(path):
        raise CheckpointError(
            f"{path} is not in the manifest, and no quantized model that could be entered; "
            f"known: {', '.join(COMMANDS)}"
        )
    cpu = torch.device("cpu")
    plan = plan_opens2s(path, cpu)[0] if path.name == EIGHT_BIT else plan_causal_lm(path, cpu)
    if not plan.quantized:
        raise CheckpointError(f"{path} holds nothing quantized; make it with: {make_command(path)}")
    check_method(path)
    speech = path.name in SPEECH_LMS.values()
    if path.name != EIGHT_BIT and isinstance(plan.model, SpeechLM) != speech:
        raise CheckpointError(f"{path} {'holds no' if speech else 'holds a'} speech LM")


def _check_source(models: Path, name: str, made: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what was made from another model than the one beside it."""
    source = models / OPENS2S
    if "source" not in made or not source.is_dir():
        return
    if made["source"] != _fingerprint(source, name):
        raise CheckpointError(
            f"{models / name} was made from another model than {source}, or from other files of it"
        )


def _fingerprint(source: Path, name: str) -> str:
    if name == EIGHT_BIT:
        return source_fingerprint(source)
    speech = name in SPEECH_LMS.values()
    return LanguageFiles.open(source, "speech_lm" if speech else "llm").fingerprint()
