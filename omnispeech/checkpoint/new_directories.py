"""Directories of a models directory that are made together, each whole or not there."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.whole_file import sync
from omnispeech.errors import CheckpointError


def make_directories(
    models: Path, writers: Mapping[str, Callable[[Path], None]], made: Mapping[str, Any]
) -> None:
    """`models/name` for each name of `writers`, which fill an empty directory, and its entry.

    made: of the manifest. Raises CheckpointError, before anything is written, for one that is there
    and not empty.
    """
    if models.exists() and not models.is_dir():
        raise CheckpointError(f"{models} is not a directory")
    for name in writers:
        _refuse_occupied(models / name)
    models.mkdir(parents=True, exist_ok=True)
    for name in writers:
        _clear(models, name)
    partial = {name: models / f".{name}.{os.getpid()}.partial" for name in writers}
    try:
        for name, write in writers.items():
            partial[name].mkdir()
            write(partial[name])
            _sync(partial[name])
        for name, path in partial.items():
            os.replace(path, models / name)
            sync(models)
            Manifest(models).enter(name, made)
    finally:
        for path in partial.values():
            shutil.rmtree(path, ignore_errors=True)


def _refuse_occupied(path: Path) -> None:
    if path.is_symlink() or path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} is there already; name another directory, or delete it")


def _clear(models: Path, name: str) -> None:
    """What one that was killed has left."""
    for left in models.glob(f".{name}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _sync(directory: Path) -> None:
    for path in (directory, *directory.rglob("*")):
        sync(path)
