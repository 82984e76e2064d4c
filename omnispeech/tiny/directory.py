"""Writes a models directory: an OpenS2S checkpoint and a speech decoder that fits it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import DECODER, OPENS2S
from omnispeech.checkpoint.wavlm_paths import WAVLM
from omnispeech.checkpoint.whole_file import sync
from omnispeech.errors import CheckpointError
from omnispeech.tiny.decoder import write_decoder
from omnispeech.tiny.opens2s import write_opens2s
from omnispeech.tiny.shape import TinyShape
from omnispeech.tiny.wavlm import write_wavlm


def write_tiny(
    directory: Path, seed: int = 0, shape: TinyShape | None = None, *, wavlm: bool = False
) -> list[str]:
    """`directory/OpenS2S`, `directory/glm-4-voice-decoder` and, if asked for,
    `directory/wavlm-base-plus`, each whole or not there -> their names.

    The same seed and shape give the same bytes.
    """
    shape = shape or TinyShape()
    writers: dict[str, Callable[[Path], None]] = {
        OPENS2S: lambda path: write_opens2s(path, seed, shape),
        DECODER: lambda path: write_decoder(path, seed, shape.decoder, shape.units),
    }
    if wavlm:
        writers[WAVLM] = lambda path: write_wavlm(path, seed, shape.wavlm)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    for name in writers:
        _refuse_occupied(directory / name)
    directory.mkdir(parents=True, exist_ok=True)
    partial = {name: directory / f".{name}.{os.getpid()}.partial" for name in writers}
    try:
        for name, write in writers.items():
            partial[name].mkdir()
            write(partial[name])
            _sync(partial[name])
        for name, path in partial.items():
            os.replace(path, directory / name)
            Manifest(directory).enter(name, {"by": "omnispeech tiny", "seed": seed})
    finally:
        for path in partial.values():
            shutil.rmtree(path, ignore_errors=True)
    return list(writers)


def _refuse_occupied(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} is there already; name another directory, or delete it")


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            sync(path)
