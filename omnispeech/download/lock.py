"""One fetch at a time into a models directory, of all processes."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omnispeech.errors import CheckpointError

logger = logging.getLogger(__name__)

FILE_NAME = ".omnispeech-fetch.lock"


@contextmanager
def locked(models_directory: Path) -> Iterator[None]:
    """Waits for another process, and says so. The lock ends with the process, however that ends.

    The directory is made if it is not there; raises CheckpointError if nothing can be written.
    """
    try:
        models_directory.mkdir(parents=True, exist_ok=True)
        file = (models_directory / FILE_NAME).open("w")
    except OSError as exc:
        raise CheckpointError(
            f"nothing can be written to the models directory {models_directory}: {exc.strerror}; "
            "make it writable for this user, or name another with --models"
        ) from exc
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is fetching into %s; waiting for it", models_directory)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
