"""What one training works on: the audio, divided, and the two networks."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from omnispeech.assembly import choose_device
from omnispeech.bridge_training.clips import Split, find_audio, split
from omnispeech.bridge_training.fitting import untrained_bridge
from omnispeech.bridge_training.listeners import Listeners
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import OPENS2S, fetch_command
from omnispeech.checkpoint.shards import Shards
from omnispeech.checkpoint.wavlm import (
    BridgeOwners,
    WavLMFiles,
    checkpoint_fingerprint,
    load_wavlm,
    read_wavlm,
)
from omnispeech.checkpoint.wavlm_paths import BRIDGE, ENCODER, WAVLM
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.json_file import read_json
from omnispeech.models.omnispeech import OmniSpeechConfig
from omnispeech.models.wavlm import Bridge, WavLMConfig
from omnispeech.speech_calibration import Ears

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeSettings:
    models: Path
    data: Path | None = None  # None: the spoken questions that ship with the project
    hold_out: float = 0.1  # share of the files
    seed: int = 0  # of which files are held out, and of the untrained bridge
    device: str = "auto"
    dry_run: bool = False
    overwrite: bool = False
    restart: bool = False

    @property
    def output(self) -> Path:
        return self.models.absolute() / BRIDGE


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    settings: BridgeSettings
    split: Split
    wavlm: WavLMFiles
    untrained: Bridge
    owners: BridgeOwners
    signature: Mapping[str, Any]  # what decides the result

    @property
    def output(self) -> Path:
        return self.settings.output

    @property
    def device(self) -> torch.device:
        return self.untrained.temporal_adapter.weight.device

    def listeners(self) -> Listeners:
        ears = Ears(self.settings.models / OPENS2S, self.device, torch.float32)
        width = self.untrained.dimension_projection.out_features
        wavlm = load_wavlm(self.wavlm, width, self.device, torch.float32)
        wavlm.load_state_dict(self.untrained.state_dict(), strict=False, assign=True)
        return Listeners(wavlm, ears)


def open_job(settings: BridgeSettings) -> Job:
    """Raises ConfigError or CheckpointError for what is missing; nothing is decoded or heard."""
    device = choose_device(settings.device)
    Manifest(settings.models).names()  # one that cannot be read is told before the work
    width = _encoder_width(settings.models / OPENS2S)
    wavlm = read_wavlm(settings.models / WAVLM, convert=not settings.dry_run)
    parts = split(find_audio(settings.data), settings.hold_out, settings.seed)
    shards = Shards(settings.models / OPENS2S, CPU)
    owners = BridgeOwners(wavlm=wavlm.fingerprint, checkpoint=checkpoint_fingerprint(shards))
    encoder = hashlib.sha256()
    for piece in shards.identity(ENCODER):
        encoder.update(piece)
    hidden = wavlm.config(width).hidden_size
    return Job(
        settings=settings,
        split=parts,
        wavlm=wavlm,
        untrained=untrained_bridge(hidden, width, settings.seed, device),
        owners=owners,
        signature={
            "sources": {"encoder": encoder.hexdigest(), **asdict(owners)},
            "data": parts.digest,
        },
    )


def _encoder_width(directory: Path) -> int:
    """Of the frames that are to be given; raises CheckpointError if nothing gives them."""
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is missing or not whole; its audio encoder is what the bridge learns "
            f"from: bring it with: {fetch_command(directory.parent, OPENS2S)}"
        )
    config = OmniSpeechConfig.from_dict(read_json(directory / "config.json")).audio_encoder
    if isinstance(config, WavLMConfig):
        raise ConfigError(
            f"{directory} hears with WavLM already: it has no other audio encoder to learn from"
        )
    return config.d_model
