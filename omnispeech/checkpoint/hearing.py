"""WavLM in a checkpoint: body and bridge, each from the checkpoint itself or from beside it.

A checkpoint whose audio encoder is a WavLM may bring either. One with the published encoder
brings neither, and of its own encoder no byte is read.
"""

import logging
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from omnispeech.checkpoint.files import assign_weights, check_weights, size_text
from omnispeech.checkpoint.shards import Shards, TensorFiles
from omnispeech.checkpoint.wavlm import (
    WavLMFiles,
    checkpoint_fingerprint,
    plain_weights,
    read_bridge,
    read_wavlm,
    wavlm_config,
)
from omnispeech.checkpoint.wavlm_paths import BODY, ENCODER, LAYERS, WavLMPaths
from omnispeech.checkpoint.weight_plan import Target
from omnispeech.errors import CheckpointError
from omnispeech.models.wavlm import WavLMConfig, WavLMEncoder
from omnispeech.models.whisper import EncoderConfig, WhisperEncoder

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class Hearing:
    """A WavLM and its bridge, read and found to fit, not yet in the model."""

    encoder: WavLMEncoder
    weights: dict[str, Tensor]  # by the names in `encoder`
    source: str

    def load(self, target: Target) -> int:
        """Into the encoder, with the lines that tell it -> bytes as they were stored."""
        logger.info("🔄 Loading WavLM from %s...", self.source)
        began = time.perf_counter()
        weights = {n: w.to(target.device, target.dtype) for n, w in self.weights.items()}
        assign_weights(self.encoder, weights, self.source)
        size = sum(weight.nbytes for weight in weights.values())
        seconds = time.perf_counter() - began
        logger.info("✅ WavLM and its bridge loaded (%s, %.1f s)", size_text(size), seconds)
        return sum(weight.nbytes for weight in self.weights.values())


def with_wavlm(
    encoder: EncoderConfig | WavLMConfig, paths: WavLMPaths | None
) -> EncoderConfig | WavLMConfig:
    """The config of what hears in place of `encoder`, with outputs as wide."""
    if paths is None or paths.body is None:
        return encoder
    return wavlm_config(paths.body, encoder.d_model)


def open_hearing(
    directory: Path, encoder: WhisperEncoder | WavLMEncoder, paths: WavLMPaths | None
) -> Hearing | None:
    """None if `encoder` of the checkpoint in `directory` is no WavLM; it is still on meta.

    Raises CheckpointError for what is missing, damaged, misshapen, or does not belong together.
    """
    if not isinstance(encoder, WavLMEncoder) or paths is None:
        return None
    tensors = Shards(directory, CPU)
    body = read_wavlm(paths.body) if paths.body else _stored_body(directory, encoder, tensors)
    weights = {f"wavlm.{name}": weight for name, weight in body.weights.items()}
    bridge = (
        _bridge_between(paths.bridge, directory, tensors, body)
        if paths.bridge
        else _stored(tensors, *LAYERS)
    )
    sources = [str(path or directory) for path in (paths.body, paths.bridge)]
    hearing = Hearing(encoder, weights | bridge, " with ".join(dict.fromkeys(sources)))
    shapes = {name: tuple(weight.shape) for name, weight in hearing.weights.items()}
    check_weights(encoder, shapes, hearing.source)
    return hearing


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
                f"omnispeech train-bridge --models {shlex.quote(str(path.parent))} --overwrite"
            )
    return bridge.weights
