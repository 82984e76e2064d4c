"""Where the parts of a WavLM are found: in a checkpoint, or beside it in the models directory."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from omnispeech.json_file import read_json

WAVLM, BRIDGE = "wavlm-base-plus", "wavlm-bridge"

# in a checkpoint
ENCODER = "audio_encoder_model."
BODY = f"{ENCODER}wavlm."
LAYERS = (f"{ENCODER}temporal_adapter.", f"{ENCODER}dimension_projection.")  # of the bridge


@dataclass(frozen=True, slots=True, kw_only=True)
class WavLMPaths:
    """Directories that a WavLM is read from; None: the checkpoint brings that part itself."""

    body: Path | None
    bridge: Path | None


def is_wavlm(directory: Path) -> bool:
    """Whether the audio encoder of an OpenS2S directory is a WavLM."""
    if not (directory / "config.json").is_file():
        return False  # whoever loads it says what is missing
    encoder = read_json(directory / "config.json").get("audio_encoder_config")
    return isinstance(encoder, dict) and encoder.get("model_type") == "wavlm"


def wavlm_paths(models: Path, base: Path) -> WavLMPaths:
    """For a checkpoint `base` that is to hear by a WavLM; what it brings is not looked for."""
    names = _tensor_names(base) if is_wavlm(base) else ()
    return WavLMPaths(
        body=None if _any_of(names, BODY) else models / WAVLM,
        bridge=None if _any_of(names, *LAYERS) else models / BRIDGE,
    )


def own_wavlm(directory: Path) -> WavLMPaths | None:
    """What a checkpoint hears by that is loaded alone; what it does not bring lies beside it."""
    return wavlm_paths(directory.parent, directory) if is_wavlm(directory) else None


def _tensor_names(directory: Path) -> Collection[str]:
    import torch

    from omnispeech.checkpoint.shards import Shards

    return Shards(directory, torch.device("cpu")).names


def _any_of(names: Collection[str], *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in names)
