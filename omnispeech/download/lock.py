"""One fetch at a time into a models directory, of all processes."""

import errno
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omnispeech.checkpoint.models_directory import check_place, nearest
from omnispeech.errors import CheckpointError

logger = logging.getLogger(__name__)

FILE_NAME = ".omnispeech-fetch.lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)
FETCHED = "what was fetched is kept, and the fetch goes on from there"


@contextmanager
def locked(models_directory: Path, *, way: str = "--models", full: str = FETCHED) -> Iterator[None]:
    """Waits for another process, and says so. The lock ends with the process, however that ends.

    The directory is made if it is not there; raises CheckpointError if nothing can be written, and
    in place of errors of the disk while the lock is held.
    way: of `check_place`. full: what is to be known where the disk is full.
    """
    check_place(models_directory, way)
    try:
        models_directory.mkdir(parents=True, exist_ok=True)
        file = (models_directory / FILE_NAME).open("w")
    except OSError as exc:
        raise CheckpointError(
            f"nothing can be written to the models directory {models_directory}: {exc.strerror}; "
            f"make it writable for this user, or name another: {way} DIR"
        ) from exc
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is fetching into %s; waiting for it", models_directory)
            fcntl.flock(file, fcntl.LOCK_EX)
        with _disk_told(models_directory, full):
            yield


@contextmanager
def _disk_told(models_directory: Path, full: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in FULL:
            raise CheckpointError(
                f"the disk of {models_directory} is full ({exc.strerror}); {full}: make room and "
                "start again"
            ) from exc
        if exc.errno in IN_THE_WAY and (name := exc.filename2 or exc.filename):
            raise CheckpointError(
                f"{nearest(Path(name))} is in the way of what is fetched ({exc.strerror}): move it "
                "away and start again"
            ) from exc
        raise
