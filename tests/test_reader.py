"""Several threads bring tensors from files to their device."""

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omnispeech.checkpoint import reader
from omnispeech.checkpoint.reader import Request, read_tensor, read_tensors
from omnispeech.checkpoint.shards import Shards
from omnispeech.checkpoint.tensor_file import TensorFile, write_tensor_file
from omnispeech.errors import CheckpointError

CPU = torch.device("cpu")
SHAPES = {"a": (700, 33), "b": (0, 4), "c": (), "d": (5001,), "e": (3, 7, 11)}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TensorFile:
    """Tensors of many pieces, of less than one, of none."""
    monkeypatch.setattr(reader, "PIECE", 1024)
    monkeypatch.setattr(reader, "SCRATCH", 256)
    monkeypatch.setattr(reader, "CAST", 32)
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.uint8, torch.int64]
    tensors = {
        name: torch.randn(shape).mul(50).abs().to(dtype)
        for (name, shape), dtype in zip(SHAPES.items(), dtypes, strict=True)
    }
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensor_file(tmp_path / "model.safetensors", layout, tensors.__getitem__)
    return TensorFile(tmp_path / "model.safetensors")


def requests(file: TensorFile, dtype: torch.dtype | None = None) -> list[Request]:
    return [Request(file, name, dtype or file.entries[name].dtype) for name in file.in_order()]


class LazyTransfers:
    """Copies as late as is allowed: a buffer that is written to too early spoils them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waits = 0
        self.under_way = 0

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def allocated(self) -> None:
        pass

    def send(self, target: Tensor, source: Tensor) -> list[Callable[[], Any]]:
        with self.lock:
            self.under_way += 1
        return [lambda: target.copy_(source)]

    def wait(self, sent: list[Callable[[], Any]]) -> None:
        self.waits += 1
        self.arrive(sent)

    def arrive(self, sent: list[Callable[[], Any]]) -> None:
        with self.lock:
            if sent:
                sent.pop()()
                self.under_way -= 1

    def arrive_all(self) -> None:
        self.under_way = 0


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to_device", [False, True])
def test_several_threads_bring_what_one_brings(
    file: TensorFile, threads: int, dtype: torch.dtype | None, to_device: bool
) -> None:
    wanted = requests(file, dtype)
    serial = [read_tensor(request, CPU) for request in wanted]
    before = file.bytes_read
    transfers = LazyTransfers() if to_device else None
    # a transfer keeps the type that is stored: only the host casts on the way
    if to_device:
        wanted = requests(file)
        serial = [read_tensor(request, CPU) for request in wanted]
        before = file.bytes_read
    found = list(read_tensors(wanted, CPU, threads, transfers))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, serial, strict=True))
    assert file.bytes_read - before == sum(entry.size for entry in file.entries.values())
    assert not to_device or transfers.waits  # buffers were used again


def test_tensors_come_in_the_order_that_was_asked_for(file: TensorFile) -> None:
    wanted = [request for request in requests(file) for _ in range(3)][::-1]
    found = list(read_tensors(wanted, CPU, 4))
    for request, tensor in zip(wanted, found, strict=True):
        assert torch.equal(tensor, file.read(request.name))


def readers() -> int:
    return sum(thread.name == "reader" for thread in threading.enumerate())


def test_no_thread_is_left_when_all_is_read_or_reading_is_given_up(file: TensorFile) -> None:
    tensors = read_tensors(requests(file), CPU, 3)
    next(tensors)
    assert readers() == 3
    tensors.close()
    assert readers() == 0
    list(read_tensors(requests(file), CPU, 3))
    assert readers() == 0


def test_no_copy_is_under_way_to_memory_that_is_freed(
    file: TensorFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfers = LazyTransfers()
    tensors = read_tensors(requests(file), CPU, 3, transfers)
    next(tensors)
    tensors.close()
    assert transfers.under_way == 0
    original, calls = TensorFile.read_bytes, []

    def fail(self: TensorFile, *given: Any) -> None:
        calls.append(given)
        if len(calls) > 5:
            raise RuntimeError("out of memory")
        original(self, *given)

    monkeypatch.setattr(TensorFile, "read_bytes", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(read_tensors(requests(file), CPU, 1, transfers))
    assert transfers.under_way == 0


def test_the_first_error_ends_all_and_names_the_file(file: TensorFile) -> None:
    wanted = requests(file) * 50
    with file.path.open("r+b") as opened:
        opened.truncate(file.size // 2)
    with pytest.raises(CheckpointError, match=rf"{file.path} is damaged: it ends at byte"):
        list(read_tensors(wanted, CPU, 4))
    assert readers() == 0


def test_an_error_that_nobody_expected_arrives_as_well(
    file: TensorFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TensorFile, "read_bytes", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(read_tensors(requests(file), CPU, 4))


def test_a_file_that_failed_is_let_go_with_its_error(file: TensorFile) -> None:
    """Whoever goes on without a copy that was cut short needs its memory, and its disk."""
    damaged = TensorFile(file.path)
    file.path.write_bytes(b"")
    alive = weakref.ref(damaged)
    gc.disable()
    try:
        with contextlib.suppress(CheckpointError):
            list(read_tensors(requests(damaged), CPU, 2))
        del damaged
        assert alive() is None
    finally:
        gc.enable()


def test_little_is_read_ahead_of_a_slow_caller(tmp_path: Path) -> None:
    """Not the whole file into memory while the first tensors are being repacked."""
    layout = {f"{i:02}": (torch.uint8, (1 << 20,)) for i in range(40)}
    path = tmp_path / "model.safetensors"
    write_tensor_file(path, layout, lambda _: torch.zeros(1 << 20, dtype=torch.uint8))
    shards = Shards(tmp_path, CPU)
    saved, reader.AHEAD = reader.AHEAD, 4 << 20
    try:
        tensors = shards.read_all([(name, torch.uint8) for name in shards.names], CPU, 3)
        for count in range(1, 5):
            next(tensors)
            time.sleep(0.05)
            assert shards.bytes_read <= (count + 1 + 5) << 20
        tensors.close()
    finally:
        reader.AHEAD = saved


def test_casting_starts_no_threads_of_torch_under_the_readers() -> None:
    """Its grain: a call on fewer numbers runs where it is called."""
    assert reader.CAST < 32768
    assert reader.PIECE % reader.SCRATCH == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_what_the_file_holds(tmp_path: Path) -> None:
    device = torch.device("cuda")
    tensors = {f"{i}": torch.randn(3000, 4000).bfloat16() for i in range(8)}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensor_file(tmp_path / "model.safetensors", layout, tensors.__getitem__)
    shards = Shards(tmp_path, device)
    wanted = [(name, torch.float32) for name in shards.names]
    for (name, _), found in zip(wanted, shards.read_all(wanted, device, 4), strict=True):
        assert found.device.type == "cuda"
        assert torch.equal(found.cpu(), tensors[name].float())
