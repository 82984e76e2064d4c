"""Whether a directory that came without a record is a whole model, by its headers."""

from collections.abc import Callable
from pathlib import Path

import torch

from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.checkpoint.models_directory import DECODER, OPENS2S
from omnispeech.checkpoint.opens2s import plan_opens2s
from omnispeech.checkpoint.wavlm import read_wavlm
from omnispeech.checkpoint.wavlm_paths import WAVLM


def check_complete(path: Path) -> None:
    """Raises CheckpointError, with what is missing. What is published as pickles is converted."""
    CHECKS[path.name](path)


def _check_opens2s(path: Path) -> None:
    plan_opens2s(path, torch.device("cpu"))


def _check_decoder(path: Path) -> None:
    load_decoder(path)


def _check_wavlm(path: Path) -> None:
    read_wavlm(path)


CHECKS: dict[str, Callable[[Path], None]] = {
    OPENS2S: _check_opens2s,
    DECODER: _check_decoder,
    WAVLM: _check_wavlm,
}
