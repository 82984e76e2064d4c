"""`omnispeech verify`: whether models are what was entered, made of the model beside them."""

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
    advice,
    check,
    check_method,
    is_there,
    make_command,
)
from omnispeech.checkpoint.opens2s import plan_opens2s
from omnispeech.checkpoint.prepared import check_origin, prepared_entries
from omnispeech.checkpoint.quantized import plan_causal_lm
from omnispeech.checkpoint.wavlm import check_wavlm_conversion, read_bridge
from omnispeech.checkpoint.wavlm_paths import BRIDGE, WAVLM
from omnispeech.download.models import MODELS
from omnispeech.download.present import is_filled, take_over
from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json
from omnispeech.layers.packing import Scheme
from omnispeech.models.speech_lm import SpeechLM
from omnispeech.quantization.report import JSON
from omnispeech.quantization.verify import StoredModel, check_digests
from omnispeech.quantization.whole_model import source_fingerprint

KNOWN = (*COMMANDS, *MODELS, BRIDGE)
MADE: Mapping[str, Any] = {"by": "omnispeech verify"}
NEW = "entered: headers fit, no earlier record to compare with"
COMPARED = {"scheme", "kept", "digests"}  # keys of a report with which tensors can be compared


@dataclass(frozen=True, slots=True)
class Verdict:
    name: str
    whole: bool
    words: str


def verify(models: Path, names: Sequence[str], *, deep: bool = False) -> Iterator[Verdict]:
    """Checks directories of a models directory, one by one.

    names: none for all that are entered or could be. One that is not entered is entered if it is
    whole by its headers, a quantized one if its tensors are those of its report as well. deep:
    every byte is compared; without it only those of files with another time, as after copying.
    """
    if not models.is_dir():
        raise CheckpointError(f"{models} is no models directory; use --models")
    entered = Manifest(models).names()
    there = [name for name in KNOWN if (models / name).is_dir() and is_filled(models / name)]
    given = [name.rstrip("/") for name in names]  # as a shell completes them
    for name in given or sorted({*entered, *there}):
        try:
            yield Verdict(name, True, _verify(models, name, deep=deep))
        except CheckpointError as exc:
            yield Verdict(name, False, f"{exc}{advice(models / name)}")


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
        elif name == WAVLM:
            check_wavlm_conversion(models / name)
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
    if name not in KNOWN or not is_there(path):
        raise CheckpointError(
            f"{path} is not in the manifest, and no model that could be entered; "
            f"known: {', '.join(KNOWN)}"
        )
    if name in MODELS:
        return NEW if take_over(path) else "complete, and not entered: read-only"
    if name == BRIDGE:
        read_bridge(path)
        manifest.enter(name, MADE)
        return NEW
    return _enter_quantized(manifest, models, name)


def _enter_quantized(manifest: Manifest, models: Path, name: str) -> str:
    path = models / name
    _check_headers(path)
    made, words = MADE, NEW
    report = read_json(path / JSON) if (path / JSON).is_file() else {}
    if report.keys() >= COMPARED:
        stored = StoredModel(path, Scheme(**report["scheme"]), report["kept"])
        check_digests(stored, report["digests"], path)
        made = {**made, **report.get("signature", {})}
        words = f"entered: every tensor is as its {JSON} says"
    _check_source(models, name, made)
    manifest.enter(name, made)
    return words


def _check_headers(path: Path) -> None:
    """Raises CheckpointError unless all tensors of a quantized directory are there and fit."""
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
