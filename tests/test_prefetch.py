"""Which bytes of a start are read ahead, and that they are in memory then."""

import ctypes
import logging
import mmap
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from quantized_models import CPU, quantize_language_model, quantize_opens2s
from settled_models import AWQ, write_settled

from omnispeech.assembly import load_sources
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import Sources, choose_sources
from omnispeech.checkpoint.opens2s import Loading
from omnispeech.checkpoint.prepared import Machine
from omnispeech.checkpoint.tensor_file import Entry, TensorFile
from omnispeech.deployment import prefetch
from omnispeech.deployment.prefetch import Prefetch, Stretch, ahead, ready_copies, stretches
from omnispeech.errors import CheckpointError
from omnispeech.service import build_worker, settings_of

MACHINE = Machine(CPU)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_settled(tmp_path_factory.mktemp("prefetch") / "models")
    quantize_language_model(path / "OpenS2S", path / "OpenS2S-speech-lm-awq", part="speech_lm")
    quantize_opens2s(path / "OpenS2S", path / "OpenS2S-8bit")
    for name in ("OpenS2S-speech-lm-awq", "OpenS2S-8bit"):
        Manifest(path).enter(name, {})
    return path


@pytest.fixture(autouse=True)
def nothing_between_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "JOINED", 0)


class Bytes:
    """Which bytes of which files were asked for: a mark for each."""

    def __init__(self) -> None:
        self.marks: dict[Path, bytearray] = {}

    def mark(self, path: Path, start: int, size: int) -> None:
        marks = self.marks.setdefault(path, bytearray(path.stat().st_size))
        marks[start : start + size] = b"x" * size

    def of_tensors(self, without: set[Path]) -> dict[Path, bytes]:
        """Headers are left out, and files of which nothing else was asked for."""
        found = {}
        for path in self.marks.keys() - without:
            entries = TensorFile(path).entries.values()
            first = min((entry.start for entry in entries), default=0)
            found[path] = bytes(self.marks[path][first:])
        return {path: marks for path, marks in found.items() if any(marks)}


def note_reads(monkeypatch: pytest.MonkeyPatch) -> Bytes:
    """What loading asks of files of tensors from here on."""
    read, fill = Bytes(), TensorFile._fill

    def noted(file: TensorFile, start: int, target: memoryview) -> None:
        read.mark(file.path, start, len(target))
        fill(file, start, target)

    monkeypatch.setattr(TensorFile, "_fill", noted)
    return read


@pytest.mark.parametrize("prepare", [True, False])
@pytest.mark.parametrize(
    ("llm", "speech_lm"), [("bf16", "bf16"), ("awq", "bf16"), ("awq", "awq"), ("8bit", "bf16")]
)
def test_what_a_start_reads_is_read_ahead_and_nothing_else(
    models: Path, llm: str, speech_lm: str, prepare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = choose_sources(models, llm, speech_lm)
    loading = Loading(prepare=prepare)
    load_sources(sources, CPU, torch.float32, loading=loading)  # what is made once is made
    ahead = Bytes()
    for stretch in stretches(sources, ready_copies(sources, MACHINE) if prepare else {}):
        ahead.mark(stretch.path, stretch.start, stretch.size)
    read = note_reads(monkeypatch)
    load_sources(sources, CPU, torch.float32, loading=loading)
    decoder = {sources.decoder / f"{name}.safetensors" for name in ("flow", "hift")}
    assert decoder < ahead.marks.keys()  # read by safetensors itself
    assert ahead.of_tensors(without=decoder) == read.of_tensors(without=decoder)


def test_neighbours_are_read_as_one() -> None:
    places = [(116, 4), (100, 10), (110, 5), (130, 10)]
    entries = [Entry(torch.uint8, (size,), start, size) for start, size in places]
    joined = [(s.start, s.size) for s in prefetch._joined(Path("x"), entries)]
    assert joined == [(100, 15), (116, 4), (130, 10)]


def in_memory(path: Path) -> int:
    """Bytes of a file that the page cache holds, by mincore."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as memory:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(memory)
        status = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), pages
        )
        del start
        assert status == 0, os.strerror(ctypes.get_errno())
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


def forgotten(path: Path, size: int) -> Path:
    """A file of random bytes that is on the disk alone; skips where that cannot be."""
    path.write_bytes(os.urandom(size))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if in_memory(path):
        pytest.skip("this file system keeps its files in memory")
    return path


def test_what_was_read_ahead_is_in_memory(tmp_path: Path) -> None:
    path = forgotten(tmp_path / "weights", 24 << 20)
    reading = Prefetch([Stretch(path, 0, 24 << 20)], limit=1 << 40)
    reading.start()
    reading.wait()
    reading.close()
    assert in_memory(path) == 24 << 20
    assert reading.bytes_read == 24 << 20


def test_no_more_is_read_than_there_is_room_for(tmp_path: Path) -> None:
    path = forgotten(tmp_path / "weights", 64 << 20)
    reading = Prefetch([Stretch(path, 0, 64 << 20)], limit=5 << 20)
    reading.start()
    reading.wait()
    reading.close()
    assert reading.bytes_read == 5 << 20
    assert in_memory(path) < 32 << 20  # the system reads on a little by itself


def test_on_a_cpu_half_of_the_free_memory_is_left_to_what_is_loaded(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefetch, "available_memory", lambda: 3_000_000)
    with caplog.at_level(logging.INFO):
        ahead(lambda: None, choose_sources(models), MACHINE, prepare=True)()
    assert "of which 1.5 MB fit" in caplog.text


def test_the_log_says_how_much_was_read_in_what_time(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = choose_sources(models, "bf16")
    reading = Prefetch(stretches(sources), limit=1 << 40)
    with caplog.at_level(logging.INFO):
        reading.start()
        reading.wait()
        reading.close()
    size = sum(stretch.size for stretch in stretches(sources))
    assert reading.bytes_read == size
    assert f"prefetch: {size / 1e6:.1f} MB read in 0." in caplog.text and "GB/s)" in caplog.text


def test_reading_ends_with_the_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(descriptor: int, size: int, start: int) -> bytes:
        time.sleep(0.05)
        return bytes(size)

    monkeypatch.setattr(prefetch.os, "pread", slow)
    path = tmp_path / "weights"
    path.write_bytes(b"")
    many = [Stretch(path, 0, 1 << 10)] * 2000
    reading = Prefetch(many, limit=1 << 40)
    reading.start()
    reading.close()
    assert reading.bytes_read < 1000 << 10


def test_a_file_that_went_is_for_the_loading_to_complain_of(tmp_path: Path) -> None:
    reading = Prefetch([Stretch(tmp_path / "gone", 0, 100)], limit=1 << 40)
    reading.start()
    reading.wait()
    reading.close()
    assert reading.bytes_read == 0


def test_what_loading_raises_is_raised(models: Path) -> None:
    def load() -> None:
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        ahead(load, choose_sources(models), MACHINE, prepare=True)()


@pytest.mark.parametrize("wanted", [True, False])
def test_it_is_a_setting_of_a_start(
    models: Path, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sources] = []
    monkeypatch.setattr(prefetch, "ahead", lambda load, sources, *_, **__: seen.append(sources))
    build_worker(settings_of({"models": str(models), "device": "cpu", "prefetch": wanted}, {}))
    assert [sources.llm for sources in seen] == [models / AWQ] * wanted


def test_a_copy_that_is_not_current_is_not_read_ahead(models: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(models, tmp_path / "models"))
    sources = choose_sources(other)
    assert ready_copies(sources, MACHINE).keys() == {AWQ}
    (copy,) = other.glob(f"{AWQ}.prepared-*")
    shutil.rmtree(copy)
    assert not ready_copies(sources, MACHINE)
