"""`omnispeech doctor`: what a start with these settings would do, and whether it would succeed."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import OPENS2S, Sources, check, check_place
from omnispeech.checkpoint.weight_plan import Target
from omnispeech.config import HubConfig, PlaceConfig
from omnispeech.deployment import machine
from omnispeech.deployment.findings import Finding, complaints, good, log_lines
from omnispeech.deployment.memory import Need, memory_need
from omnispeech.deployment.start import (
    changes,
    choice,
    conversion,
    missing,
    preparation,
    repacked_size,
    unconverted,
    units,
)
from omnispeech.download.hub import offline, offline_mode
from omnispeech.download.models import MODELS, Model, known_model, mend_command
from omnispeech.download.present import fetched_size, room_for
from omnispeech.quantization.memory import free_memory
from omnispeech.service import Settings, choose_target
from omnispeech.small.directory import lacking, shipped_size
from omnispeech.startup import names_of


def examine(settings: Settings, hub: HubConfig, *, small: bool = False) -> list[Finding]:
    """Nothing is loaded or fetched; what was found, in the order in which a start would meet it.

    small: of startup.py.
    """
    findings = [machine.versions(), *machine.environment()]
    target = None
    with complaints("port", findings):
        findings.append(machine.port(settings.server))
    with complaints("door", findings):
        findings.append(machine.door(settings))
    with complaints("device", findings):
        target = choose_target(settings.place)
        findings.append(machine.device(target))
    models, coming, packed = Path(settings.place.models), list[str](), list[str]()
    with complaints("models", findings):
        check_place(models)
        coming = missing(models, settings.place)
        packed = _packed(models, settings.place, hub, wanted=small)
    if not good([finding for finding in findings if finding.topic == "models"]):
        return findings
    if packed:
        words = f"startup.py puts the small model there: {', '.join(packed)}"
        findings.append(Finding("note", "models", words))
    sources = _sources(settings, models, coming, findings)
    needed = shipped_size() if packed else 0
    if sources is not None and target is not None and not coming:
        with complaints("weights", findings):
            needed = _written(sources, target, settings.place)
            findings += preparation(sources, target, prepare=settings.place.prepare)
            findings += memory(memory_need(sources, target, settings.engine), target)
    with complaints("disk", findings):
        fetched = [known_model(name, hub) for name in coming if name not in packed]
        findings += _disk(models, fetched, hub, needed)
    findings.append(machine.caches(models))
    return findings


def _packed(models: Path, place: PlaceConfig, hub: HubConfig, *, wanted: bool) -> list[str]:
    """Names of directories that come with omnispeech, and not from the hub."""
    if OPENS2S not in names_of(models, place):
        return []
    return lacking(models, hub, wanted=wanted)


def _written(sources: Sources, target: Target, place: PlaceConfig) -> int:
    """Bytes that a start writes beside what is there."""
    pickles = sum(path.stat().st_size for path in unconverted(sources))
    return pickles + (repacked_size(sources, target) if place.prepare else 0)


def _sources(
    settings: Settings, models: Path, coming: Collection[str], findings: list[Finding]
) -> Sources | None:
    sources = choice(settings.place, findings, coming)
    with log_lines("omnispeech.checkpoint") as lines, complaints("manifest", findings):
        fetched = [n for n in Manifest(models).names() if n in MODELS and n not in coming]
        findings += changes(models, fetched, check)
    findings += [Finding("note", "manifest", line) for line in lines]
    if sources is not None and not coming:
        with complaints("conversion", findings):
            findings.append(conversion(sources))
        with complaints("decoder", findings):
            findings.append(units(sources))
    return sources


def _disk(models: Path, fetched: Sequence[Model], hub: HubConfig, needed: int) -> Iterator[Finding]:
    """What would be fetched, and whether there is room for that and for `needed` bytes more."""
    for model in fetched:
        yield _download(models / model.name, model, hub)
    left = sum(max(0, model.size - fetched_size(models / model.name)) for model in fetched)
    yield machine.disk(models, needed + room_for(left))


def _download(path: Path, model: Model, hub: HubConfig) -> Finding:
    if offline_mode():
        return Finding("wrong", "download", str(offline(model.name)))
    begun = f", of which {size_text(size)} are here" if (size := fetched_size(path)) else ""
    words = (
        f"{model.name} is not there: about {size_text(model.size)} of {model.repo}{begun}; "
        f"startup.py fetches it, and so does: {mend_command(path, hub)}"
    )
    return Finding("note", "download", words)


def memory(need: Need, target: Target) -> Iterator[Finding]:
    for part, size in need.known.items():
        yield Finding("ok", "memory", f"{part}: {size_text(size)}")
    kind = "memory" if target.device.type == "cpu" else "GPU memory"
    words = f"at work, with libraries: {size_text(need.estimated)} (estimated)"
    yield Finding("ok", "memory", words)
    free = free_memory(target.device)
    total = f"needs about {size_text(need.total)} of {kind}, {size_text(free)} are free"
    if need.total > free:
        total += (
            "; take a quantized LLM (--llm awq), fewer --kv-tokens, or free some: "
            "another process may hold it"
        )
    yield Finding("wrong" if need.total > free else "ok", "memory", total)
