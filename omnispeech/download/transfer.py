"""The files of one model, several at a time: each resumed, hashed while it comes, verified."""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

from omnispeech.download.hub import FAILURES, Hub, HubFile, Listing
from omnispeech.download.partial import Partial
from omnispeech.download.present import STOPPED
from omnispeech.download.progress import Progress
from omnispeech.download.retries import Patience, Retries, Stopped
from omnispeech.download.verification import PIECE, Digest
from omnispeech.errors import CheckpointError

logger = logging.getLogger(__name__)

ARRIVALS = 3  # of one file whose hash is wrong every time
TICK_S = 0.2  # between two looks at the progress


class BrokenOff(Exception):
    """The answer ended before the file did."""


class Transfer:
    def __init__(
        self, hub: Hub, listing: Listing, partial: Partial, patience: Patience, progress: Progress
    ) -> None:
        self._hub, self._listing, self._partial = hub, listing, partial
        self._patience, self._progress = patience, progress
        self._stop = threading.Event()

    def run(self, files: Sequence[HubFile], connections: int) -> None:
        """Brings `files`, large ones first; the first error ends all of them."""
        largest_first = sorted(files, key=lambda file: -file.size)
        pool = ThreadPoolExecutor(connections, thread_name_prefix="fetch")
        try:
            waiting = {pool.submit(self._bring, file) for file in largest_first}
            while waiting:
                done, waiting = wait(waiting, TICK_S, FIRST_EXCEPTION)
                self._progress.show()
                _raise_first(done)
        except KeyboardInterrupt:
            logger.info(STOPPED)
            raise
        finally:
            self._stop.set()  # after Ctrl-C, too, no thread fetches on
            pool.shutdown(cancel_futures=True)
            self._progress.close()

    def _bring(self, file: HubFile) -> None:
        for arrival in range(1, ARRIVALS + 1):
            digest = self._receive(file)
            if digest.hash == file.hash:
                self._partial.keep(file, digest.sha256)
                return
            size = self._discard(file)
            self._progress.add(-size)
            if arrival < ARRIVALS:
                logger.warning("%s arrived damaged; fetching it again", file.path)
        raise CheckpointError(
            f"{file.path} of {self._listing.model.repo} arrived damaged {ARRIVALS} times: its "
            f"hash should be {file.hash}, it is {digest.hash}; start again later, or check what "
            f"lies between here and {self._hub.endpoint}"
        )

    def _discard(self, file: HubFile) -> int:
        path = self._partial.incomplete(file)
        size = path.stat().st_size
        path.unlink()
        return size

    def _receive(self, file: HubFile) -> Digest:
        """The digest of all its bytes, those of an earlier run included."""
        retries = Retries(self._hub, self._listing.model, self._patience, self._stop)
        with Content(self._partial.incomplete(file), file) as content:
            while content.size < file.size:
                try:
                    self._append(content, file, retries)
                    if content.size < file.size:
                        raise BrokenOff(f"the answer ended at byte {content.size} of {file.size}")
                except (*FAILURES, BrokenOff) as exc:
                    retries.failed(exc, file.path)
            return content.digest

    def _append(self, content: "Content", file: HubFile, retries: Retries) -> None:
        with self._hub.read(self._listing, file, content.size) as (start, pieces):
            if start != content.size:  # the hub does not continue: from the beginning
                self._progress.add(-content.size)
                content.clear()
            for piece in pieces:
                content.add(piece)
                self._progress.add(len(piece))
                retries.reached(content.size)
                if self._stop.is_set():
                    raise Stopped
                if content.size > file.size:
                    return


class Content:
    """A file that grows, and its digest."""

    def __init__(self, path: Path, file: HubFile) -> None:
        self._path, self._file = path, file
        self.size = 0
        self.digest = Digest(file)

    def __enter__(self) -> "Content":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._out = self._path.open("ab", buffering=0)  # a kill loses nothing
        if self._path.stat().st_size > self._file.size:
            self.clear()
            return self
        with self._path.open("rb") as before:
            while piece := before.read(PIECE):
                self._count(piece)
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def add(self, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest:  # an unbuffered file may take a part
            rest = rest[self._out.write(rest) :]
        self._count(piece)

    def clear(self) -> None:
        self._out.truncate(0)
        self.size, self.digest = 0, Digest(self._file)

    def _count(self, piece: bytes) -> None:
        self.size += len(piece)
        self.digest.update(piece)


def _raise_first(done: set[Future[None]]) -> None:
    """What went wrong itself before those that were stopped by it."""
    errors = [error for future in done if (error := future.exception())]
    errors.sort(key=lambda error: isinstance(error, Stopped))
    if errors:
        raise errors[0]
