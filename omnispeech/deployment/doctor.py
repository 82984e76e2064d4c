"""`omnispeech doctor`: what a start with these settings would do, and whether it would succeed."""

from collections.abc import Iterator
from pathlib import Path

from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import Sources, fetch_command
from omnispeech.checkpoint.weight_plan import Target
from omnispeech.config import HubConfig, PlaceConfig
from omnispeech.deployment import machine
from omnispeech.deployment.findings import Finding, complaints
from omnispeech.deployment.memory import Need, memory_need
from omnispeech.deployment.start import (
    changes,
    choice,
    conversion,
    missing,
    preparation,
    repacked_size,
    unconverted,
)
from omnispeech.download.models import MODELS, Model, known_model
from omnispeech.quantization.memory import free_memory
from omnispeech.service import Settings


def examine(settings: Settings, hub: HubConfig) -> list[Finding]:
    """Nothing is loaded or fetched; what was found, in the order in which a start would meet it."""
    findings = [machine.versions(), *machine.environment()]
    target = None
    with complaints("port", findings):
        findings.append(machine.port(settings.server))
    with complaints("device", findings):
        target = machine.choose_target(settings.place)
        findings.append(machine.device(target))
    if not (models := Path(settings.place.models)).is_dir():
        findings.append(Finding("wrong", "models", f"{models} is no directory; use --models"))
        return findings
    sources = _sources(settings, models, findings)
    needed = 0
    if sources is not None and target is not None:
        with complaints("weights", findings):
            needed = _written(sources, target, settings.place)
            findings += preparation(sources, target, prepare=settings.place.prepare)
            findings += memory(memory_need(sources, target, settings.engine), target)
    with complaints("disk", findings):
        findings += _disk(settings.place, hub, needed)
    findings.append(machine.caches(models))
    return findings


def _written(sources: Sources, target: Target, place: PlaceConfig) -> int:
    """Bytes that a start writes beside what is there."""
    pickles = sum(path.stat().st_size for path in unconverted(sources))
    return pickles + (repacked_size(sources, target) if place.prepare else 0)


def _sources(settings: Settings, models: Path, findings: list[Finding]) -> Sources | None:
    sources = choice(settings.place, findings)
    with complaints("manifest", findings):
        findings += changes(models, [n for n in Manifest(models).names() if n in MODELS])
    if sources is not None:
        with complaints("conversion", findings):
            findings.append(conversion(sources))
    return sources


def _disk(place: PlaceConfig, hub: HubConfig, needed: int) -> Iterator[Finding]:
    """What would be fetched, and whether there is room for that and for `needed` bytes more."""
    models = Path(place.models)
    fetched = [known_model(name, hub) for name in missing(models, place)]
    for model in fetched:
        yield Finding("note", "download", _download(models, model))
    yield machine.disk(models, needed + sum(model.size for model in fetched))


def _download(models: Path, model: Model) -> str:
    size = size_text(model.size)
    return (
        f"{model.name} is not there: about {size} of {model.repo}; startup.py fetches it, and so "
        f"does: {fetch_command(models, model.name)}"
    )


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
