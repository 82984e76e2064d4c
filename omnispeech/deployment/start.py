"""Which directories a start takes and what it would still have to do: the same code as the start
itself, asked without loading anything."""

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from omnispeech.checkpoint.decoder import PUBLISHED
from omnispeech.checkpoint.decoder_config import read_config
from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.manifest import Manifest, Touched
from omnispeech.checkpoint.models_directory import (
    Sources,
    advice,
    check_units,
    verify_command,
)
from omnispeech.checkpoint.pickles import is_current
from omnispeech.checkpoint.prepared import Machine, find_prepared
from omnispeech.checkpoint.shards import weight_files
from omnispeech.checkpoint.wavlm import PICKLED, WEIGHTS
from omnispeech.checkpoint.weight_plan import Target
from omnispeech.config import PlaceConfig
from omnispeech.deployment.findings import Finding, complaints, log_lines
from omnispeech.download.present import is_filled
from omnispeech.errors import CheckpointError
from omnispeech.prompt import UnitVocabulary
from omnispeech.service import find_sources
from omnispeech.startup import names_of


def choice(
    place: PlaceConfig, findings: list[Finding], coming: Collection[str] = ()
) -> Sources | None:
    """What a start takes, with the words of its log; None if it would end here.

    coming: names of directories that it would fetch.
    Like the start it compares every byte of what looks changed, and notes in the manifest what was
    only copied.
    """
    sources = None
    with log_lines("omnispeech.checkpoint") as lines, complaints("models", findings):
        sources = find_sources(place, coming)
    findings.extend(Finding("note", "models", line) for line in lines)
    if sources is not None:
        findings.extend(Finding("ok", "takes", str(path)) for path in directories(sources))
    return sources


def directories(sources: Sources) -> list[Path]:
    heard = sources.wavlm and (sources.wavlm.body, sources.wavlm.bridge)
    taken = (sources.base, sources.llm, sources.speech_lm, *(heard or ()), sources.decoder)
    return [path for path in taken if path is not None]


def missing(models: Path, place: PlaceConfig) -> list[str]:
    """Names of directories that `startup.py` would fetch."""
    return [name for name in names_of(models, place) if not is_filled(models / name)]


def changes(
    models: Path, names: Iterable[str], check: Callable[[Manifest, str], None]
) -> Iterator[Finding]:
    """Directories that are not as they were entered in the manifest."""
    manifest = Manifest(models)
    for name in names:
        try:
            check(manifest, name)
        except Touched as error:
            command = verify_command(models, name)
            yield Finding("wrong", "manifest", f"{error} (to compare every byte: {command})")
        except CheckpointError as error:
            yield Finding("wrong", "manifest", f"{error}{advice(models / name)}")


def unconverted(sources: Sources) -> list[Path]:
    """Pickles that a start converts; raises CheckpointError where one is missing."""
    pickles = [sources.decoder / name for name in PUBLISHED]
    body = sources.wavlm and sources.wavlm.body
    if body and not (body / WEIGHTS).is_file():
        pickles.append(body / PICKLED)
    return [path for path in pickles if not _is_converted(path)]


def _is_converted(pickled: Path) -> bool:
    converted = pickled.with_suffix(".safetensors")
    if not pickled.exists() and not converted.exists():
        raise CheckpointError(f"{pickled} is missing{advice(pickled.parent)}")
    return is_current(converted, pickled)


def conversion(sources: Sources) -> Finding:
    """Raises CheckpointError, see `unconverted`."""
    if found := unconverted(sources):
        size = sum(path.stat().st_size for path in found)
        names = " and ".join(path.name for path in found)
        words = f"{names} ({size_text(size)}) will be converted to safetensors, once"
        return Finding("note", "conversion", words)
    return Finding("ok", "conversion", "nothing is left to convert")


def units(sources: Sources) -> Finding:
    """Raises CheckpointError where model and decoder do not belong together."""
    flow, _ = read_config(sources.decoder / "config.yaml")
    spoken = UnitVocabulary.from_directory(sources.base / "tts").count
    check_units(sources, spoken, flow.vocab_size)
    return Finding("ok", "decoder", f"knows the {spoken} units of {sources.base.name}")


def preparation(sources: Sources, target: Target, *, prepare: bool) -> Iterator[Finding]:
    """Whether quantized weights are there as the kernels of this machine want them."""
    for name, copy in find_prepared(sources, Machine(target.device, target.kernel)).items():
        if not prepare:
            yield Finding("ok", "repacking", f"{name} is repacked at every start (--no-prepare)")
        elif copy.state == "current":
            yield Finding("ok", "repacking", f"{copy.name} is loaded as it is")
        else:
            words = f"{name} will be repacked for this machine, once"
            yield Finding("note", "repacking", words)


def repacked_size(sources: Sources, target: Target) -> int:
    """Bytes that a start writes at most for kernel-ready copies: never more than their models."""
    copies = find_prepared(sources, Machine(target.device, target.kernel))
    models = sources.base.parent
    waiting = [models / name for name, copy in copies.items() if copy.state != "current"]
    return sum(path.stat().st_size for model in waiting for path in weight_files(model))
