"""WavLM in a checkpoint: body and bridge, each from the checkpoint itself or from beside it.

A checkpoint whose audio encoder is a WavLM may bring either. One with the published encoder
brings neither, and of its own encoder no byte is read.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor

from omnispeech.checkpoint.files import assign_weights, check_weights, held_bytes, size_text
from omnispeech.checkpoint.models_directory import train_command
from omnispeech.checkpoint.shards import Shards, TensorFiles
from omnispeech.checkpoint.wavlm import (
    WEIGHTS,
    WavLMFiles,
    checkpoint_fingerprint,
    plain_weights,
    read_bridge,
    read_wavlm,
    wavlm_config,
    wavlm_file,
)
from omnispeech.checkpoint.wavlm_paths import BODY, ENCODER, LAYERS, WavLMPaths
from omnispeech.checkpoint.weight_plan import Target
from omnispeech.errors import CheckpointError
from omnispeech.models.wavlm import WavLMConfig, WavLMEncoder
from omnispeech.models.whisper import EncoderConfig
from omnispeech.phases import Phases

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


def with_wavlm(
    encoder: EncoderConfig | WavLMConfig, paths: WavLMPaths | None
) -> EncoderConfig | WavLMConfig:
    """The config of what hears in place of `encoder`, with outputs as wide."""
    if paths is None or paths.body is None:
        return encoder
    return wavlm_config(paths.body, encoder.d_model)


def load_hearing(
    directory: Path, encoder: WavLMEncoder, paths: WavLMPaths, target: Target, phases: Phases
) -> None:
    """Fills `encoder` of the checkpoint in `directory`, which is on meta, with lines that tell it.

    Raises CheckpointError for what is missing, damaged, misshapen, or does not belong together.
    """
    sources = [str(path or directory) for path in (paths.body, paths.bridge)]
    source = " with ".join(dict.fromkeys(sources))
    logger.info("🔄 Loading WavLM from %s...", source)
    with phases.measure("load WavLM") as phase:
        tensors, files = Shards(directory, CPU), _files(paths)
        weights = _read(directory, encoder, paths, tensors)
        check_weights(encoder, {name: tuple(w.shape) for name, w in weights.items()}, source)
        placed = {name: w.to(target.device, target.dtype) for name, w in weights.items()}
        assign_weights(encoder, placed, source)
        phase.size = tensors.bytes_read + sum(path.stat().st_size for path in files)
    size = size_text(held_bytes(encoder))
    logger.info("✅ WavLM and its bridge loaded (%s, %.1f s)", size, phase.seconds)


def _files(paths: WavLMPaths) -> list[Path]:
    """Those beside the checkpoint that are read, found before a pickle among them is converted."""
    body = [wavlm_file(paths.body)] if paths.body else []
    return body + ([paths.bridge / WEIGHTS] if paths.bridge else [])


def _read(
    directory: Path, encoder: WavLMEncoder, paths: WavLMPaths, tensors: TensorFiles
) -> dict[str, Tensor]:
    """By the names in `encoder`."""
    body = read_wavlm(paths.body) if paths.body else _stored_body(directory, encoder, tensors)
    bridge = (
        _bridge_between(paths.bridge, directory, tensors, body)
        if paths.bridge
        else _stored(tensors, *LAYERS)
    )
    return {f"wavlm.{name}": weight for name, weight in body.weights.items()} | bridge


def _stored(tensors: TensorFiles, *prefixes: str) -> dict[str, Tensor]:
    """By the names in the encoder."""
    return {
        name.removeprefix(ENCODER): tensors.read(name, CPU, torch.float32)
        for name in tensors.names
        if name.startswith(prefixes)
    }


def _stored_body(directory: Path, encoder: WavLMEncoder, tensors: TensorFiles) -> WavLMFiles:
    return WavLMFiles(
        path=directory,
        settings=dict(encoder.config.body),
        do_normalize=encoder.config.do_normalize,
        weights=plain_weights(_stored(tensors, BODY), str(directory)),
    )


def _bridge_between(
    path: Path, directory: Path, tensors: TensorFiles, body: WavLMFiles
) -> dict[str, Tensor]:
    bridge = read_bridge(path)
    owners = (
        ("checkpoint", directory, bridge.owners.checkpoint, checkpoint_fingerprint(tensors)),
        ("WavLM", body.path, bridge.owners.wavlm, body.fingerprint),
    )
    for what, owner, wanted, found in owners:
        if wanted != found:
            raise CheckpointError(
                f"{path} was trained for another {what} than {owner}; train one for it with: "
                f"{train_command(path.parent)} --overwrite"
            )
    return bridge.weights
