"""What is fetched: one repository becomes one directory of the models directory."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

from omnispeech.checkpoint.models_directory import DECODER, OPENS2S, fetch_command
from omnispeech.checkpoint.wavlm_paths import WAVLM
from omnispeech.config import HubConfig
from omnispeech.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    name: str  # of the directory
    repo: str
    revision: str  # a branch, a tag or a commit
    patterns: tuple[str, ...]  # of the paths that are fetched, as a shell writes them
    needed: tuple[str, ...]  # paths without which it is another model
    size: int  # bytes on disk, about; the exact size is known when the hub was asked

    @property
    def flags(self) -> str:
        """Settings that name its repository and revision, for a command line."""
        name = {OPENS2S: "opens2s", DECODER: "decoder", WAVLM: "wavlm"}[self.name]
        repo, revision = shlex.quote(self.repo), shlex.quote(self.revision)
        return f"--{name}-repo {repo} --{name}-revision {revision}"


def models(hub: HubConfig) -> Mapping[str, Model]:
    """By the name of the directory, with the repositories and revisions of `hub`."""
    table = (
        Model(
            name=OPENS2S,
            repo=hub.opens2s_repo,
            revision=hub.opens2s_revision,
            patterns=("*",),
            needed=("config.json", "tokenizer.json", "audio/preprocessor_config.json"),
            size=22_100_000_000,
        ),
        Model(
            name=DECODER,
            repo=hub.decoder_repo,
            revision=hub.decoder_revision,
            patterns=("config.yaml", "flow.pt", "hift.pt", "LICENSE*", "README.md"),
            needed=("config.yaml", "flow.pt", "hift.pt"),
            size=530_000_000,
        ),
        Model(
            name=WAVLM,
            repo=hub.wavlm_repo,
            revision=hub.wavlm_revision,
            patterns=("*.json", "pytorch_model.bin", "model.safetensors", "README.md"),
            needed=("config.json",),
            size=378_000_000,
        ),
    )
    return MappingProxyType({model.name: model for model in table})


MODELS = models(HubConfig())


def mend_command(path: Path, hub: HubConfig) -> str:
    """What brings the directory `path`, or what it lacks, from the hub that is set."""
    return " ".join([fetch_command(path.parent, path.name), *_flags(hub)])


def publish_command(models_directory: Path, hub: HubConfig) -> str:
    """What brings OpenS2S and decoder from the hub that is set, in place of what is there."""
    place = shlex.quote(str(models_directory))
    return " ".join([f"omnispeech fetch --update --models {place}", *_flags(hub)])


def _flags(hub: HubConfig) -> list[str]:
    """The settings of a hub as flags, those that are no defaults."""
    given = {f.name: getattr(hub, f.name) for f in fields(hub) if getattr(hub, f.name) != f.default}
    return [f"--{name.replace('_', '-')} {shlex.quote(str(given[name]))}" for name in given]


def known_model(name: str, hub: HubConfig) -> Model:
    """Raises ConfigError for what is no name of a fetched directory."""
    if name not in MODELS:
        raise ConfigError(f"{name!r} is not fetched from a hub; known: {', '.join(MODELS)}")
    return models(hub)[name]
