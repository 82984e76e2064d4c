"""Byte ranges of `.safetensors` files: read, written, and refused when damaged."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnispeech.checkpoint import tensor_file
from omnispeech.checkpoint.files import replace_file
from omnispeech.checkpoint.lora import MergedLora
from omnispeech.checkpoint.shards import Shards
from omnispeech.checkpoint.tensor_file import DTYPES, TensorFile, write_tensor_file
from omnispeech.errors import CheckpointError

CPU = torch.device("cpu")
LARGE = 6 << 30  # bytes of a file that is mostly holes

# the directory of an example is written over by the next one, which is what we want
in_one_directory = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tensor_plans = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(list(DTYPES.values())), shapes, st.integers(0, 999)),
    max_size=6,
)


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 100, shape, generator=generator)
    return (numbers % 2 if dtype == torch.bool else numbers).to(dtype)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_tensor_file(path, layout, lambda name: tensors[name])


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in expected.items()
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    save_file({"a": torch.arange(12.0).view(4, 3), "b": torch.arange(5)}, path, {"format": "pt"})
    return path


# round trips


@in_one_directory
@given(tensor_plans)
def test_what_is_written_is_read_back_by_us_and_by_safetensors(
    tmp_path: Path, plans: dict[str, Any]
) -> None:
    tensors = {name: filled(*plan) for name, plan in plans.items()}
    path = tmp_path / "round.safetensors"
    write(path, tensors)
    file = TensorFile(path)
    assert equal({name: file.read(name) for name in file.entries}, tensors)
    assert equal(load_file(path), tensors)
    assert file.metadata == {"format": "pt"}


@in_one_directory
@given(tensor_plans)
def test_what_safetensors_writes_is_read(tmp_path: Path, plans: dict[str, Any]) -> None:
    tensors = {name: filled(*plan) for name, plan in plans.items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    file = TensorFile(tmp_path / "theirs.safetensors")
    assert equal({name: file.read(name) for name in file.entries}, tensors)


def test_the_order_in_which_tensors_are_named_does_not_change_the_bytes(tmp_path: Path) -> None:
    tensors = {name: filled(torch.float16, (3, 2), i) for i, name in enumerate("abc")}
    write(tmp_path / "one", tensors)
    write(tmp_path / "two", dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_every_tensor_is_aligned_to_its_numbers(tmp_path: Path) -> None:
    write(tmp_path / "file", {name: filled(d, (3,), 0) for name, d in DTYPES.items()})
    entries = TensorFile(tmp_path / "file").entries
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in entries.values())


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    view = torch.arange(12.0).view(3, 4).T
    write(tmp_path / "file", {"view": view})
    assert torch.equal(TensorFile(tmp_path / "file").read("view"), view)


def test_a_tensor_that_is_not_as_planned_stops_the_writer(tmp_path: Path) -> None:
    layout = {"a": (torch.float16, (2, 2))}
    with pytest.raises(CheckpointError, match=r"a is .*float32.* and not .*float16"):
        replace_file(
            tmp_path / "file", lambda path: write_tensor_file(path, layout, lambda _: torch.ones(4))
        )
    assert not list(tmp_path.iterdir())


def test_the_writer_asks_for_one_tensor_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    sizes = []

    def read(name: str) -> Tensor:
        sizes.append(path.stat().st_size if path.exists() else 0)
        return torch.zeros(1 << 20)

    write_tensor_file(path, {name: (torch.float32, (1 << 20,)) for name in "abc"}, read)
    assert [round(size / (4 << 20)) for size in sizes] == [0, 1, 2]


# parts


def test_only_what_is_asked_for_is_read(small: Path) -> None:
    file = TensorFile(small)
    assert file.bytes_read == 0
    file.read("b")
    assert file.bytes_read == 5 * 8
    file.read_rows("a", [2, 0, 2])
    assert file.bytes_read == 5 * 8 + 2 * 3 * 4


@in_one_directory
@given(st.lists(st.integers(0, 19), max_size=12), st.integers(0, 3))
def test_rows_are_those_of_the_whole_tensor(tmp_path: Path, rows: list[int], width: int) -> None:
    whole = filled(torch.bfloat16, (20, width), 1)
    write(tmp_path / "file", {"whole": whole})
    file = TensorFile(tmp_path / "file")
    assert torch.equal(file.read_rows("whole", rows), whole[rows])
    assert torch.equal(file.read_rows("whole", torch.tensor(rows)), whole[rows])


@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_that_is_not_there_is_refused(small: Path, row: int) -> None:
    with pytest.raises(IndexError, match="a has rows 0 to 3"):
        TensorFile(small).read_rows("a", [1, row])


def test_tensors_longer_than_one_call_are_read_in_pieces(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "PIECE", 7)
    assert torch.equal(TensorFile(small).read("a"), torch.arange(12.0).view(4, 3))


def test_what_was_read_is_ones_own(small: Path) -> None:
    file = TensorFile(small)
    file.read("a").zero_()
    assert torch.equal(file.read("a"), torch.arange(12.0).view(4, 3))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_threads_and_forked_processes_share_one_object(small: Path) -> None:
    file = TensorFile(small)
    expected = file.read("a")
    if not (child := os.fork()):
        os._exit(0 if torch.equal(file.read("a"), expected) else 1)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(t, expected) for t in pool.map(file.read, ["a"] * 200))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_descriptors_are_closed_with_the_object(small: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        TensorFile(small)
    assert len(os.listdir("/proc/self/fd")) == before


def large_file(path: Path) -> None:
    """Two large tensors and a small one behind them; a file with holes takes no room."""
    half = LARGE // 2
    header: dict[str, Any] = {
        "first": {"dtype": "U8", "shape": [half], "data_offsets": [0, half]},
        "second": {"dtype": "U8", "shape": [half], "data_offsets": [half, LARGE]},
        "small": {"dtype": "F32", "shape": [2, 1], "data_offsets": [LARGE, LARGE + 8]},
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(8 + len(text) + LARGE)
        file.write(b"\0\0\x80\x3f\0\0\0\x40")


def test_one_tensor_of_a_large_file_takes_no_more_memory_than_itself(tmp_path: Path) -> None:
    large_file(tmp_path / "model.safetensors")
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from omnispeech.checkpoint.shards import Shards\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "shards = Shards(Path(sys.argv[1]), torch.device('cpu'))\n"
        "assert shards.read('small', torch.device('cpu'), torch.float32).tolist() == [[1], [2]]\n"
        "assert shards.bytes_read == 8\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 20_000  # KiB


def test_a_tensor_without_numbers_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes((len(NOTHING) + 2).to_bytes(8, "little") + b"{%s}" % NOTHING)
    assert TensorFile(tmp_path / "file").read("a").shape == (0,)


# damage


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["a"].update(dtype=["F32"]), "has dtype"),
        (lambda h: h["a"].update(shape=[4, 4]), "takes 64 bytes, its data_offsets are"),
        (lambda h: h["a"].update(shape=[-4, -3]), "has shape"),
        (lambda h: h["a"].update(shape=[4.0, 3]), "has shape"),
        (lambda h: h["a"].update(data_offsets=[0, 48]), "overlaps the tensor before it"),
        (lambda h: h["b"].update(data_offsets=[0, 40, 80]), "data_offsets"),
        (lambda h: h["b"].update(data_offsets=[1 << 70, (1 << 70) + 40]), "gap"),
        (lambda h: h.pop("b"), "leaves a gap behind"),
        (lambda h: h.pop("a"), "its header describes"),
        (lambda h: h["a"].pop("dtype"), "the header of 'a' is not dtype, shape and data_offsets"),
        (lambda h: h.update(a=3), "the header of 'a' is not"),
        (lambda h: h.update(__metadata__={"a": 1}), "__metadata__ is no object of texts"),
    ],
)
def test_a_header_that_does_not_fit_the_file_is_damage(
    small: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(small, change)
    with pytest.raises(CheckpointError) as error:
        TensorFile(small)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{small} is damaged: ")
    assert str(error.value).endswith("; fetch it again")


def test_a_type_of_another_version_is_no_damage(small: Path) -> None:
    rewrite(small, lambda h: h["a"].update(dtype="F8_E4M3"))
    with pytest.raises(CheckpointError) as error:
        TensorFile(small)
    assert str(error.value).startswith(f"{small} holds 'a' as F8_E4M3, which this version cannot")
    assert "known: I64, F64" in str(error.value)
    assert "fetch it again" not in str(error.value)


NOTHING = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"null",
        b"{%s,%s}" % (NOTHING, NOTHING),
        b"{%s}" % NOTHING.replace(b"[0]", b"[0,4611686018427387904,4]"),
        b"[" * 100_000,
        b"\xff\xfe",
        b"1" * 5000,
        b"",
    ],
    ids=["list", "null", "twice", "vast", "deep", "no text", "long number", "empty"],
)
def test_a_header_that_describes_no_tensors_is_damage(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="is damaged"):
        TensorFile(path)


@in_one_directory
@given(st.data())
def test_no_corruption_ends_in_anything_but_our_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "file"
    write(path, {"a": filled(torch.float16, (3, 5), 0), "b": filled(torch.int32, (2,), 1)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        file = TensorFile(path)
    except CheckpointError:
        return
    for name in file.entries:
        file.read(name)


def test_a_file_that_shrinks_while_it_is_open_is_damage(small: Path) -> None:
    file = TensorFile(small)
    with small.open("r+b") as opened:
        opened.truncate(small.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="is damaged: it ends at byte"):
        file.read("a")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing cannot be opened: No such file"):
        TensorFile(tmp_path / "nothing")


# directories


def test_shards_count_what_they_read_and_know_types_without_reading(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 2).half(), "n": torch.ones(3).int()}, tmp_path / "1.safetensors")
    save_file({"b": torch.arange(6.0).view(3, 2)}, tmp_path / "2.safetensors")
    places = {"a": "1.safetensors", "n": "1.safetensors", "b": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    shards = Shards(tmp_path, CPU)
    types = {name: shards.dtype(name) for name in shards.names}
    assert types == {"a": torch.float16, "n": torch.int32, "b": torch.float32}
    assert shards.bytes_read == 0
    assert shards.read("a", CPU, torch.float32).dtype == torch.float32
    assert shards.read("n", CPU, torch.float32).dtype == torch.int32
    assert shards.read_rows("b", [2]).tolist() == [[4.0, 5.0]]
    assert shards.bytes_read == 16 + 12 + 8


def test_tensors_cast_piece_by_piece_are_those_cast_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omnispeech.checkpoint.reader.CAST", 2)
    monkeypatch.setattr("omnispeech.checkpoint.reader.SCRATCH", 8)
    tensors = {"a": torch.randn(7, 3), "empty": torch.ones(0, 4), "one": torch.tensor(0.3)}
    save_file(tensors, tmp_path / "model.safetensors")
    shards = Shards(tmp_path, CPU)
    for name, tensor in tensors.items():
        assert torch.equal(shards.read(name, CPU, torch.bfloat16), tensor.bfloat16())
        assert shards.read(name, CPU, torch.float64).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_device_are_those_in_the_file(tmp_path: Path) -> None:
    device = torch.device("cuda")
    tensors = {"a": torch.randn(3000, 9000).bfloat16(), "n": torch.ones(3).int()}
    save_file(tensors, tmp_path / "model.safetensors")
    shards = Shards(tmp_path, device)
    for name, tensor in tensors.items():
        assert torch.equal(shards.read(name, device, torch.bfloat16).cpu(), tensor)


def test_rows_and_types_of_a_merged_checkpoint_are_those_of_the_merged_tensors(
    tmp_path: Path,
) -> None:
    base, a, b = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
    names = ("x.weight", "x.lora_A.default.weight", "x.lora_B.default.weight")
    tensors = dict(zip(names, (base, a, b), strict=True)) | {"y.weight": torch.randn(5, 3).half()}
    save_file(tensors, tmp_path / "model.safetensors")
    merged = MergedLora(Shards(tmp_path, CPU), {"r": 2, "lora_alpha": 4})
    assert torch.equal(merged.read_rows("y.weight", [4, 1]), tensors["y.weight"][[4, 1]])
    assert merged.bytes_read == 2 * 3 * 2
    torch.testing.assert_close(merged.read_rows("x.weight", [5, 0]), (base + 2 * b @ a)[[5, 0]])
    assert (merged.dtype("x.weight"), merged.dtype("y.weight")) == (torch.float32, torch.float16)
