"""Settings -> an engine, whichever front serves it: one process, or a replica of many."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnispeech.caches import use_caches
from omnispeech.config import (
    AccessConfig,
    DecoderConfig,
    EngineConfig,
    PlaceConfig,
    ServerConfig,
    TalkConfig,
)
from omnispeech.config_reader import build_config, read_config_file

if TYPE_CHECKING:
    from omnispeech.checkpoint.models_directory import Sources
    from omnispeech.checkpoint.weight_plan import Target
    from omnispeech.engine.runner import Models
    from omnispeech.engine.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    place: PlaceConfig
    engine: EngineConfig
    decoder: DecoderConfig
    server: ServerConfig
    talk: TalkConfig
    access: AccessConfig


def read_settings(flags: Mapping[str, Any], file: Path | None = None) -> Settings:
    """flags: by the names of the settings, None for what was not given. file: of `--config`."""
    return settings_of(flags, read_config_file(file) if file else {})


def settings_of(flags: Mapping[str, Any], file: Mapping[str, Any]) -> Settings:
    """file: what a config file held, its names checked."""
    build = partial(build_config, flags=flags, file=file)
    return Settings(
        place=build(PlaceConfig),
        engine=build(EngineConfig),
        decoder=build(DecoderConfig),
        server=build(ServerConfig),
        talk=build(TalkConfig),
        access=build(AccessConfig),
    )


def find_sources(place: PlaceConfig, coming: Collection[str] = ()) -> "Sources":
    """The directories that a start takes; raises CheckpointError for what is not whole.

    coming: names of those that will be fetched before.
    """
    from omnispeech.checkpoint.models_directory import choose_sources

    return choose_sources(
        Path(place.models), place.llm, place.speech_lm, place.audio_encoder, coming
    )


def choose_target(place: PlaceConfig) -> "Target":
    """Raises ConfigError for a device, type of numbers or kernel that is not to be had."""
    from omnispeech.assembly import choose_device, choose_dtype
    from omnispeech.checkpoint.weight_plan import Target
    from omnispeech.layers.linear import known_kernel

    device = choose_device(place.device)
    dtype, kernel = choose_dtype(place.dtype, device), known_kernel(place.kernel)
    return Target(device, dtype, kernel, place.read_threads)


def build_worker(settings: Settings) -> "Worker":
    """Not yet started; what can be known to be wrong before models are loaded is raised here."""
    use_caches(Path(settings.place.models))
    from omnispeech.assembly import load_sources
    from omnispeech.checkpoint.opens2s import Loading
    from omnispeech.engine.worker import Worker
    from omnispeech.phases import Phases

    place = settings.place
    sources = find_sources(place)
    target = choose_target(place)
    phases = Phases()
    load: Callable[[], Models] = partial(
        load_sources,
        sources,
        target.device,
        target.dtype,
        kernel=target.kernel,
        compatible=settings.engine.compatible,
        loading=Loading(threads=place.read_threads, prepare=place.prepare, phases=phases),
    )
    if place.prefetch:
        from omnispeech.checkpoint.prepared import Machine
        from omnispeech.deployment.prefetch import ahead

        load = ahead(load, sources, Machine(target.device, target.kernel), prepare=place.prepare)
    return Worker(load, settings.engine, settings.decoder, phases)
