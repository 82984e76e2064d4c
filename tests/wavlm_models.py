"""Small models directories with a WavLM in them, and checkpoints that hear by one."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnispeech.checkpoint.files import build_on_meta
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.shards import Shards
from omnispeech.checkpoint.wavlm import (
    BridgeOwners,
    checkpoint_fingerprint,
    read_wavlm,
    write_bridge,
)
from omnispeech.models.wavlm import Bridge
from omnispeech.tiny.directory import write_tiny
from omnispeech.tiny.weights import random_weights

CPU = torch.device("cpu")
NORM = "encoder.pos_conv_embed.conv."
NEW_NAMES = {
    f"{NORM}weight_g": f"{NORM}parametrizations.weight.original0",
    f"{NORM}weight_v": f"{NORM}parametrizations.weight.original1",
}


def write_models(directory: Path, seed: int = 0) -> Path:
    write_tiny(directory, seed, wavlm=True)
    return directory


def pickled(models: Path) -> dict[str, Tensor]:
    weights = torch.load(models / "wavlm-base-plus/pytorch_model.bin", weights_only=True)
    assert isinstance(weights, dict)
    return weights


def random_bridge(seed: int = 0, hidden: int = 64, d_model: int = 64) -> Bridge:
    bridge = build_on_meta(lambda: Bridge(hidden, d_model))
    assert isinstance(bridge, Bridge)
    bridge.load_state_dict(random_weights(bridge, seed, torch.float32), assign=True)
    return bridge


def owners(models: Path, checkpoint: str = "OpenS2S") -> BridgeOwners:
    return BridgeOwners(
        wavlm=read_wavlm(models / "wavlm-base-plus", convert=False).fingerprint,
        checkpoint=checkpoint_fingerprint(Shards(models / checkpoint, CPU)),
    )


def add_bridge(models: Path, bridge: Bridge | None = None, of: BridgeOwners | None = None) -> None:
    (models / "wavlm-bridge").mkdir(exist_ok=True)
    write_bridge(models / "wavlm-bridge", bridge or random_bridge(), of or owners(models))
    Manifest(models).enter("wavlm-bridge", {"by": "a test"})


def change_config(directory: Path, **audio_encoder: Any) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["audio_encoder_config"] = audio_encoder
    path.write_text(json.dumps(raw), encoding="utf-8")


def make_wavlm_checkpoint(
    models: Path, *, body: dict[str, Tensor] | None, bridge: Bridge | None, **config: Any
) -> Path:
    """Its own encoder taken out of `models/OpenS2S`, the given parts put in, in one file."""
    directory = models / "OpenS2S"
    weights: dict[str, Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        weights |= load_file(shard)
        shard.unlink()
    (directory / "model.safetensors.index.json").unlink()
    prefix = "audio_encoder_model."
    kept = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    kept |= {f"{prefix}wavlm.{name}": value for name, value in (body or {}).items()}
    kept |= {f"{prefix}{n}": v for n, v in (bridge.state_dict() if bridge else {}).items()}
    save_file({n: v.contiguous() for n, v in kept.items()}, directory / "model.safetensors")
    change_config(directory, **{"model_type": "wavlm", "d_model": 64, **config})
    return directory
