"""Tensors of files -> memory of a device: several threads read large pieces, in a given order.

Each piece goes straight to where it belongs. Only what has to be cast or sent to a GPU passes
through buffers that are used again: beside the tensors each thread takes 1 MB, and on the way to a
GPU two pieces of pinned memory, which is 128 MB for 8 threads.
"""

import os
import threading
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from omnispeech.checkpoint.tensor_file import TensorFile

PIECE = 8 << 20  # bytes that one thread reads at a time
SCRATCH = 1 << 20  # bytes cast at a time: they are still in the cache of the processor
CAST = 32767  # numbers of one cast: for more, torch would start threads under each of these
SLOTS = 2  # buffers of each thread on the way to a GPU: one is read into, one is being sent
AHEAD = 64 << 20  # bytes of tensors behind the next one that may wait for the caller
MOST_THREADS = 8  # measured, see docs/benchmarks.md: more win nothing, and one core each is enough

Tensors = Generator[Tensor, None, None]  # to be closed if it is not used up


@dataclass(frozen=True, slots=True)
class Request:
    """One tensor of a file, in the type that it shall have."""

    file: TensorFile
    name: str
    dtype: torch.dtype

    @property
    def stored(self) -> torch.dtype:
        return self.file.entries[self.name].dtype

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.file.entries[self.name].size


@dataclass(frozen=True, slots=True)
class Piece:
    file: TensorFile
    name: str
    offset: int  # bytes into the tensor, as stored
    target: Tensor  # [numbers], a part of the tensor on its device

    def fill(self, buffer: Tensor, offset: int = 0) -> None:
        """buffer [B] uint8 on the host, from `offset` bytes into the piece on."""
        self.file.read_bytes(self.name, buffer, self.offset + offset)


class Lane(Protocol):
    """How one thread brings pieces to their place."""

    def move(self, piece: Piece) -> Any:
        """What `Transfers.arrive` waits for, None if the piece is there."""


class HostLane:
    def __init__(self) -> None:
        self._scratch = torch.empty(SCRATCH, dtype=torch.uint8)

    def move(self, piece: Piece) -> None:
        stored = piece.file.entries[piece.name].dtype
        if stored == piece.target.dtype:
            piece.fill(piece.target.view(torch.uint8))
            return
        step = SCRATCH // stored.itemsize
        for start in range(0, len(piece.target), step):
            part = piece.target[start : start + step]
            source = self._scratch[: len(part) * stored.itemsize]
            piece.fill(source, start * stored.itemsize)
            pairs = torch.split(part, CAST), torch.split(source.view(stored), CAST)
            for out, numbers in zip(*pairs, strict=True):
                out.copy_(numbers)


class Transfers(Protocol):
    """Copies from the host that go on while the next piece is read."""

    def buffer(self, size: int) -> Tensor:
        """[size] uint8 that can be sent."""

    def allocated(self) -> None:
        """Memory of the device was taken: copies may write there from now on."""

    def send(self, target: Tensor, source: Tensor) -> Any:
        """Starts to copy; what it returns tells when `source` may be written to again."""

    def wait(self, sent: Any) -> None:
        """Returns when a copy has ended."""

    def arrive(self, sent: Any) -> None:
        """Whatever the caller does next with the target comes after the copy."""

    def arrive_all(self) -> None:
        """The same of every copy that was sent: their targets may be freed from now on."""


class CudaTransfers:
    """Through pinned memory, on a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffer(self, size: int) -> Tensor:
        with torch.cuda.device(self._device):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def allocated(self) -> None:
        # what was freed there before may still be read by kernels on the stream that computes
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def send(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, sent: torch.cuda.Event) -> None:
        sent.synchronize()

    def arrive(self, sent: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(sent)

    def arrive_all(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class DeviceLane:
    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._slots = deque((transfers.buffer(PIECE), None) for _ in range(SLOTS))

    def move(self, piece: Piece) -> Any:
        """As stored: a GPU casts faster by itself."""
        slot, sent = self._slots.popleft()
        if sent is not None:
            self._transfers.wait(sent)
        source = slot[: piece.target.nbytes]
        piece.fill(source)
        sent = self._transfers.send(piece.target, source.view(piece.target.dtype))
        self._slots.append((slot, sent))
        return sent


class Arrival:
    """A tensor on its way."""

    def __init__(self, request: Request, device: torch.device) -> None:
        self.size = request.size
        self.dtype = request.dtype
        entry = request.file.entries[request.name]
        stored = request.dtype if device.type == "cpu" else request.stored
        with torch.inference_mode(False):  # only of a caller in that mode would threads know it
            self.tensor = torch.empty(entry.shape, dtype=stored, device=device)
        flat, step = self.tensor.view(-1), PIECE // request.stored.itemsize
        self.pieces = [
            Piece(request.file, request.name, start * request.stored.itemsize, flat[start:end])
            for start in range(0, len(flat), step)
            for end in [start + step]
        ]
        self.missing = len(self.pieces)
        self.sent: list[Any] = []


class Reading:
    """Threads that read what `add` puts before them; the first error ends all."""

    def __init__(self, device: torch.device, threads: int, transfers: Transfers | None) -> None:
        self._device, self._transfers = device, transfers
        self._waiting: deque[tuple[Arrival, Piece]] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._over = False
        lanes = [DeviceLane(transfers) if transfers else HostLane() for _ in range(threads)]
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name="reader", daemon=True)
            for lane in lanes
        ]
        for thread in self._threads:
            thread.start()

    def add(self, request: Request) -> Arrival:
        arrival = Arrival(request, self._device)
        if self._transfers:
            self._transfers.allocated()
        with self._changed:
            self._waiting.extend((arrival, piece) for piece in arrival.pieces)
            self._changed.notify_all()
        return arrival

    def take(self, arrival: Arrival) -> Tensor:
        """The tensor, when all of it is there; raises what stopped a thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not arrival.missing)
        if self._error:
            raise self._error
        for sent in arrival.sent:
            assert self._transfers is not None
            self._transfers.arrive(sent)
        return arrival.tensor.to(arrival.dtype)

    def close(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._error = None  # or it and this, in its traceback, would hold each other
        if self._transfers:  # of what nobody took, too: its memory is freed and given to others
            self._transfers.arrive_all()

    def _run(self, lane: Lane) -> None:
        try:
            while self._move_one(lane):
                pass
        except BaseException as error:  # raised again in the thread that waits
            with self._changed:
                self._error = self._error or error
                self._over = True
                self._changed.notify_all()

    def _move_one(self, lane: Lane) -> bool:
        """False: there will be no more. Nothing is held while it waits for the next one."""
        work = self._next()
        if work is not None:
            arrival, piece = work
            self._moved(arrival, lane.move(piece))
        return work is not None

    def _next(self) -> tuple[Arrival, Piece] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._waiting)
            return None if self._over else self._waiting.popleft()

    def _moved(self, arrival: Arrival, sent: Any) -> None:
        with self._changed:
            arrival.missing -= 1
            if sent is not None:
                arrival.sent.append(sent)
            if not arrival.missing:
                self._changed.notify_all()


def read_tensors(
    requests: Sequence[Request],
    device: torch.device,
    threads: int = 0,
    transfers: Transfers | None = None,
) -> Tensors:
    """The tensors one by one, in the order of `requests`, which should be that of the files.

    Others are read meanwhile: up to AHEAD bytes and one tensor more. Raises CheckpointError for
    what cannot be read.
    threads: 0 for as many as there are cores, up to MOST_THREADS.
    transfers: to `device`, None for memory of the host.
    """
    reading = Reading(device, threads or default_threads(), transfers)
    arrivals: deque[Arrival] = deque()
    try:
        for request in requests:
            while sum(arrival.size for arrival in list(arrivals)[1:]) >= AHEAD:
                yield reading.take(arrivals.popleft())
            arrivals.append(reading.add(request))
        while arrivals:
            yield reading.take(arrivals.popleft())
    finally:
        reading.close()


def read_tensor(
    request: Request, device: torch.device, transfers: Transfers | None = None
) -> Tensor:
    """The same in the calling thread alone."""
    lane = DeviceLane(transfers) if transfers else HostLane()
    arrival = Arrival(request, device)
    if transfers:
        transfers.allocated()
    for piece in arrival.pieces:
        sent = lane.move(piece)
        if transfers:
            transfers.arrive(sent)
    return arrival.tensor.to(request.dtype)


def transfers_to(device: torch.device) -> Transfers | None:
    """None: memory of the host, where bytes are read to at once."""
    return CudaTransfers(device) if device.type == "cuda" else None


def default_threads() -> int:
    return min(MOST_THREADS, os.cpu_count() or 1)
