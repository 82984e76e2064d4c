"""The files of a start, read ahead while it loads them.

A disk made from a snapshot fetches each block when it is first asked for: every read waits, and
many at once wait no longer than one. What was read lies in memory that the system gives up when it
is needed, so no more is read than is free, and nothing that the start does not use.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import MappingProxyType
from typing import TypeVar

from omnispeech.checkpoint.decoder import decoder_files
from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.models_directory import Sources
from omnispeech.checkpoint.prepared import FILE, find_prepared
from omnispeech.checkpoint.prepared_key import Machine
from omnispeech.checkpoint.shards import weight_files
from omnispeech.checkpoint.tensor_file import Entry, TensorFile
from omnispeech.checkpoint.wavlm import wavlm_file
from omnispeech.checkpoint.wavlm_paths import ENCODER
from omnispeech.quantization.memory import available_memory

logger = logging.getLogger(__name__)

PIECE = 4 << 20  # bytes of one read
AT_ONCE = 16  # reads: a network disk answers each after milliseconds
JOINED = 1 << 20  # bytes between two tensors that are read as well: cheaper than another read

NOTHING: Mapping[str, Path] = MappingProxyType({})

Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of a file that follow one another."""

    path: Path
    start: int
    size: int


def ahead(
    load: Callable[[], Loaded], sources: Sources, machine: Machine, *, prepare: bool
) -> Callable[[], Loaded]:
    """`load`, with the files of `sources` read ahead until it is done.

    prepare: whether it uses kernel-ready copies.
    """

    def load_with_files_ahead() -> Loaded:
        wanted = list(stretches(sources, ready_copies(sources, machine) if prepare else {}))
        # on a CPU what is loaded takes the same memory once more
        copies = 2 if machine.device.type == "cpu" else 1
        prefetch = Prefetch(wanted, limit=available_memory() // copies)
        prefetch.start()
        try:
            return load()
        finally:
            prefetch.close()

    return load_with_files_ahead


def ready_copies(sources: Sources, machine: Machine) -> dict[str, Path]:
    """Files that are read for quantized linears, by names of the directories they are of."""
    found = find_prepared(sources, machine).items()
    return {name: copy.path / FILE for name, copy in found if copy.state == "current"}


def stretches(sources: Sources, ready: Mapping[str, Path] = NOTHING) -> Iterator[Stretch]:
    """What loading `sources` reads of large files, in the order in which it does.

    Of a model of which parts are replaced, the tensors of these are left out, and so are linears
    of which there is a kernel-ready copy. ready: see `ready_copies`.
    """
    pairs = (("llm_model.", sources.llm), ("tts_lm_model.", sources.speech_lm))
    replaced = [prefix for prefix, directory in pairs if directory is not None]
    if sources.wavlm and sources.wavlm.body:
        replaced.append(ENCODER)
        yield from _whole(wavlm_file(sources.wavlm.body))
    yield from _of_model(sources.base, ready, tuple(replaced))
    for directory in filter(None, (sources.llm, sources.speech_lm)):
        yield from _of_model(directory, ready)
    yield from _whole(*decoder_files(sources.decoder))


def _whole(*paths: Path) -> Iterator[Stretch]:
    """One that is missing is for the loading to complain of."""
    return (Stretch(path, 0, path.stat().st_size) for path in paths if path.is_file())


def _of_model(
    directory: Path, ready: Mapping[str, Path], without: tuple[str, ...] = ()
) -> Iterator[Stretch]:
    files = {path: TensorFile(path).entries for path in weight_files(directory)}
    names = {name for entries in files.values() for name in entries}
    if directory.name in ready:
        names -= {name for name in names if f"{name.rpartition('.')[0]}.qweight" in names}
    for path, entries in files.items():
        wanted = (e for n, e in entries.items() if n in names and not n.startswith(without))
        yield from _joined(path, wanted)
    if directory.name in ready:
        path = ready[directory.name]
        yield from _joined(path, TensorFile(path).entries.values())


def _joined(path: Path, entries: Iterable[Entry]) -> Iterator[Stretch]:
    """In the order of the file; neighbours, and what lies close, become one."""
    start = end = -1
    for entry in sorted(entries, key=lambda entry: entry.start):
        if start >= 0 and entry.start - end > JOINED:
            yield Stretch(path, start, end - start)
            start = -1
        start, end = (entry.start if start < 0 else start), entry.start + entry.size
    if start >= 0:
        yield Stretch(path, start, end - start)


class Prefetch:
    def __init__(self, wanted: Iterable[Stretch], limit: int) -> None:
        """limit: bytes that are read at most, the first of `wanted`."""
        self._wanted = list(wanted)
        self._limit = limit
        self._stopped = Event()
        self._pool = ThreadPoolExecutor(AT_ONCE, "prefetch")
        self._began = self._ended = 0.0
        self.bytes_read = 0

    def start(self) -> None:
        """Returns at once."""
        total = sum(stretch.size for stretch in self._wanted)
        share = f", of which {size_text(self._limit)} fit" if self._limit < total else ""
        logger.info("prefetch: reading %s ahead%s", size_text(total), share)
        self._began = self._ended = time.perf_counter()
        self._reads = [self._pool.submit(self._read, piece) for piece in self._pieces()]

    def wait(self) -> None:
        """Until all is read."""
        for read in self._reads:
            read.result()

    def close(self) -> None:
        """Ends the reading, where it is not done, and says how far it came."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)
        self.bytes_read = sum(read.result() for read in self._reads if not read.cancelled())
        seconds = max(self._ended - self._began, 1e-9)
        logger.info(
            "prefetch: %s read in %.1f s (%.2f GB/s)",
            size_text(self.bytes_read),
            seconds,
            self.bytes_read / 1e9 / seconds,
        )

    def _pieces(self) -> Iterator[Stretch]:
        left = self._limit
        for stretch in self._wanted:
            for start in range(stretch.start, stretch.start + stretch.size, PIECE):
                size = min(PIECE, stretch.start + stretch.size - start, left)
                if not size:
                    return
                left -= size
                yield Stretch(stretch.path, start, size)

    def _read(self, piece: Stretch) -> int:
        """Bytes that were read; what cannot be read is for the loading to complain of."""
        if self._stopped.is_set():
            return 0
        try:
            descriptor = os.open(piece.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return 0
        try:
            return len(os.pread(descriptor, piece.size, piece.start))
        except OSError:
            return 0
        finally:
            os.close(descriptor)
            self._ended = time.perf_counter()
