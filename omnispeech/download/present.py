"""What lies in a models directory already: ready as it is, to be entered, or to be mended."""

import logging
import os
from pathlib import Path

from omnispeech.checkpoint.manifest import FileRecord, Manifest, record_file
from omnispeech.checkpoint.models_directory import SMALL, check, is_there, made_by, mending
from omnispeech.checkpoint.whole_file import size_text
from omnispeech.config import HubConfig
from omnispeech.download.lock import locked
from omnispeech.download.models import mend_command
from omnispeech.errors import CheckpointError

logger = logging.getLogger(__name__)

STOPPED = "stopped; the next start goes on from here"  # of a fetch
MARGIN = 1 << 30  # bytes that stay free: for the manifest, conversions and caches
ENTERED = {"by": "omnispeech startup", "source": "found in the models directory"}


def partial_path(path: Path) -> Path:
    """Where a fetch of the directory `path` keeps what it has brought."""
    return path.with_name(f"{path.name}.partial")


def room_for(size: int) -> int:
    """Bytes that should be free for `size` bytes to be fetched."""
    return size + min(size, MARGIN)


def fetched_size(path: Path) -> int:
    """Bytes that interrupted fetches of `path` have brought."""
    return sum(file.stat().st_size for file in partial_path(path).rglob("*") if file.is_file())


def is_filled(path: Path) -> bool:
    """Raises CheckpointError for what is no directory."""
    return is_there(path) and any(path.iterdir())


def settle(path: Path, hub: HubConfig) -> bool:
    """Whether the directory is there; then it is whole, and entered in the manifest.

    One that is entered is compared by sizes and times, and what a fetch left beside it taken away.
    One that came by hand is hashed and entered if it is complete. Raises CheckpointError, with the
    command that mends it, for one that is neither.
    """
    if not is_filled(path):
        return False
    manifest = Manifest(path.parent)
    entered = path.name in manifest.names()
    try:
        check(manifest, path.name) if entered else take_over(path)
    except CheckpointError as exc:
        of_hub = f"to mend it: {mend_command(path, hub)}"
        words = mending(path) if made_by(path) == SMALL else of_hub
        raise CheckpointError(f"{exc} ({words})") from exc
    if entered:
        _tidy(path)
    return True


def is_entered(path: Path) -> bool:
    """Whether it is there as it was entered, by sizes and times."""
    manifest = Manifest(path.parent)
    try:
        manifest.check(path.name)
    except CheckpointError:
        return False
    return True


def _tidy(path: Path) -> None:
    """A fetch may have ended between its entry in the manifest and its last file."""
    if partial_path(path).exists() and os.access(path.parent, os.W_OK):
        from omnispeech.download.partial import Partial

        with locked(path.parent):
            Partial(path.parent, path.name).tidy()


def take_over(path: Path) -> bool:
    """Whether a directory that came by hand could be entered.

    Raises CheckpointError unless it is complete.
    """
    if not os.access(path.parent, os.W_OK):
        _check_complete(path)
        logger.warning("%s is complete; it cannot be entered: read-only", path)
        return False
    from omnispeech.download.partial import Partial  # imports huggingface_hub: few starts need it

    with locked(path.parent):
        Partial(path.parent, path.name).finish()  # a fetch may have ended just before it entered
        if path.name not in Manifest(path.parent).names():
            _check_complete(path)
            _enter(path)
    return True


def _check_complete(path: Path) -> None:
    from omnispeech.checkpoint.complete import check_complete  # imports torch

    try:
        check_complete(path)
    except CheckpointError as exc:
        raise CheckpointError(f"{exc}; {path} is not in the manifest and not whole") from exc


def _enter(path: Path) -> None:
    files = own_files(path)
    size = size_text(sum(file.stat().st_size for file in files))
    logger.info("%s is complete and new here: hashing its %s once", path, size)
    records = {file.relative_to(path).as_posix(): record_file(file) for file in files}
    Manifest(path.parent).enter(path.name, ENTERED, records)


def own_files(path: Path) -> list[Path]:
    """Without what is hidden, and without conversions, which are made again when need be."""
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and not _is_conversion(file)
    )


def _is_conversion(file: Path) -> bool:
    pickles = [file.with_suffix(suffix) for suffix in (".pt", ".bin")]
    return file.suffix == ".safetensors" and any(path.exists() for path in pickles)


def compare(path: Path) -> tuple[bool, dict[str, FileRecord]]:
    """Hashes the files of an entered directory: whether all are as entered, and the records.

    Equal bytes of another time are entered with the new time.
    """
    manifest = Manifest(path.parent)
    entry = manifest.entry(path.name)
    logger.info("comparing every byte of %s", path)
    found = {file: record_file(path / file) for file in entry.compared if (path / file).is_file()}
    wanted = {file: record.sha256 for file, record in entry.compared.items()}
    whole = {file: record.sha256 for file, record in found.items()} == wanted
    if whole and found != entry.compared:
        manifest.enter(path.name, entry.made, {**entry.files, **found})
    return whole, found
