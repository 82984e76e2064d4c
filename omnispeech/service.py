"""Settings -> an engine, whichever front serves it: one process, or a replica of many."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnispeech.config import (
    DecoderConfig,
    EngineConfig,
    PlaceConfig,
    ServerConfig,
    build_config,
    read_config_file,
)

if TYPE_CHECKING:
    from omnispeech.engine.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    place: PlaceConfig
    engine: EngineConfig
    decoder: DecoderConfig
    server: ServerConfig


def read_settings(flags: Mapping[str, Any], file: Path | None = None) -> Settings:
    """flags: by the names of the settings, None for what was not given. file: of `--config`."""
    build = partial(build_config, flags=flags, file=read_config_file(file) if file else {})
    return Settings(
        place=build(PlaceConfig),
        engine=build(EngineConfig),
        decoder=build(DecoderConfig),
        server=build(ServerConfig),
    )


def build_worker(settings: Settings) -> "Worker":
    """Not yet started; what can be known to be wrong before models are loaded is raised here."""
    from omnispeech.assembly import choose_device, choose_dtype, load_sources
    from omnispeech.checkpoint.models_directory import choose_sources
    from omnispeech.engine.worker import Worker
    from omnispeech.layers.linear import known_kernel
    from omnispeech.phases import Phases

    place = settings.place
    sources = choose_sources(Path(place.models), place.llm, place.speech_lm)
    device = choose_device(place.device)
    phases = Phases()
    load = partial(
        load_sources,
        sources,
        device,
        choose_dtype(place.dtype, device),
        kernel=known_kernel(place.kernel),
        compatible=settings.engine.compatible,
        phases=phases,
    )
    return Worker(load, settings.engine, settings.decoder, phases)
