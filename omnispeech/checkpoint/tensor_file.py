"""One `.safetensors` file, read by byte ranges and written tensor by tensor.

Nothing is mapped: what is resident is what was asked for, whatever the size of the file.
"""

import hashlib
import json
import math
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from omnispeech.checkpoint.models_directory import bring_again
from omnispeech.errors import CheckpointError

# In the order in which tensors are written: wide numbers first, so that all are aligned.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PRECEDENCE = {dtype: place for place, dtype in enumerate(NAMES)}

HEADER_LIMIT = 100_000_000  # bytes; the limit of the format
LENGTH = 8  # bytes in front of the header, which say how long it is
PIECE = 1 << 30  # bytes of one call: the system moves a little less than 2 GiB at a time
LARGEST = (1 << 63) - 1

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # offset of the first byte in the file
    size: int  # bytes


class _UnknownType(Exception):
    pass


class TensorFile:
    """Reading is positional, so that threads and forked processes can share one object."""

    def __init__(self, path: Path) -> None:
        """Reads the header alone; raises CheckpointError if it and the file do not agree."""
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise CheckpointError(f"{path} cannot be opened: {exc.strerror}") from exc
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        self._read: list[int] = []  # a list, because appending needs no lock in threads and forks
        header = self._read_header()
        self.header_digest = hashlib.sha256(header).hexdigest()
        self.metadata, self.entries = self._parse(header)

    @property
    def bytes_read(self) -> int:
        """Of tensors, headers not counted."""
        return sum(self._read)

    def in_order(self) -> list[str]:
        """Names of the tensors as they follow one another in the file."""
        return sorted(self.entries, key=lambda name: self.entries[name].start)

    def read(self, name: str) -> Tensor:
        """The whole tensor in its stored type, in memory of its own."""
        entry = self.entries[name]
        data = torch.empty(entry.size, dtype=torch.uint8)
        self.read_bytes(name, data)
        return data.view(entry.dtype).view(entry.shape)

    def read_bytes(self, name: str, target: Tensor, offset: int = 0) -> None:
        """Fills target [B] uint8 on the host with the bytes from `offset` on."""
        entry = self.entries[name]
        if offset + len(target) > entry.size:
            raise ValueError(f"{name} has {entry.size} bytes, not {offset + len(target)}")
        self._fill(entry.start + offset, target.numpy().data)
        self._read.append(len(target))

    def read_rows(self, name: str, rows: Sequence[int] | Tensor) -> Tensor:
        """rows [R] of a tensor [N, K] -> [R, K], in any order; a repeated row is read once."""
        entry = self.entries[name]
        asked = torch.as_tensor(rows, dtype=torch.long).tolist()
        wanted = sorted(set(asked))
        count, width = entry.shape
        if wanted and not 0 <= wanted[0] <= wanted[-1] < count:
            raise IndexError(f"{name} has rows 0 to {count - 1}, not {wanted[0]} to {wanted[-1]}")
        size = width * entry.dtype.itemsize  # bytes of one row
        data = torch.empty(len(wanted) * size, dtype=torch.uint8)
        for first, last in _runs(wanted):
            self.read_bytes(name, data[first * size : last * size], wanted[first] * size)
        places = {row: place for place, row in enumerate(wanted)}
        found = data.view(entry.dtype).view(len(wanted), width)
        return found[[places[row] for row in asked]]  # [R, K]

    def _fill(self, start: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            try:
                moved = os.preadv(self._descriptor, [target[done : done + PIECE]], start + done)
            except OSError as exc:
                raise CheckpointError(f"{self.path} cannot be read: {exc.strerror}") from exc
            if not moved:
                raise self._damaged(f"it ends at byte {start + done}")
            done += moved

    def _read_header(self) -> bytes:
        if self.size < LENGTH:
            raise self._damaged(f"it has {self.size} bytes and no header")
        length = int.from_bytes(self._bytes(0, LENGTH), "little")
        if length > min(HEADER_LIMIT, self.size - LENGTH):
            raise self._damaged(f"a header of {length} bytes in a file of {self.size}")
        return self._bytes(LENGTH, length)

    def _bytes(self, start: int, size: int) -> bytes:
        data = bytearray(size)
        self._fill(start, memoryview(data))
        return bytes(data)

    def _parse(self, header: bytes) -> tuple[dict[str, str], dict[str, Entry]]:
        try:
            raw = json.loads(header.decode("utf-8"), object_pairs_hook=_without_repeats)
            metadata = _metadata(raw)
            base = LENGTH + len(header)
            entries = {name: _entry(name, value, base) for name, value in raw.items()}
            _check_places(entries, base, self.size)
        except _UnknownType as exc:
            raise CheckpointError(
                f"{self.path} holds {exc}, which this version cannot read; "
                f"known: {', '.join(DTYPES)}"
            ) from exc
        except (ValueError, RecursionError) as exc:
            raise self._damaged(str(exc)) from exc
        return metadata, entries

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {reason}; {bring_again(self.path.parent)}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"its header has a key twice, of {sorted(values)[:3]} ...")
    return values


def _metadata(raw: Any) -> dict[str, str]:
    """Taken out of the header, so that tensors are left."""
    if not isinstance(raw, dict):
        raise ValueError(f"its header is a {type(raw).__name__} and no object")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ is no object of texts")
    return metadata


def _entry(name: str, raw: Any, base: int) -> Entry:
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the header of {name!r} is not dtype, shape and data_offsets")
    kind, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(kind, str):
        raise ValueError(f"{name!r} has dtype {kind!r}")
    if kind not in DTYPES:
        raise _UnknownType(f"{name!r} as {kind}")
    if not (_whole(shape) and _whole(offsets) and len(offsets) == 2):
        raise ValueError(f"{name!r} has shape {shape!r} and data_offsets {offsets!r}")
    size = math.prod(shape) * DTYPES[kind].itemsize
    if math.prod(max(n, 1) for n in shape) > LARGEST or offsets[1] - offsets[0] != size:
        raise ValueError(
            f"{name!r} of {kind} {shape} takes {size} bytes, its data_offsets are {offsets}"
        )
    return Entry(DTYPES[kind], tuple(shape), base + offsets[0], size)


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def _check_places(entries: Mapping[str, Entry], base: int, size: int) -> None:
    """Tensors lie end to end from the header to the end of the file."""
    end = base
    for name, entry in sorted(entries.items(), key=lambda e: (e[1].start, e[1].size)):
        if entry.start != end:
            kind = "overlaps" if entry.start < end else "leaves a gap behind"
            raise ValueError(f"{name!r} {kind} the tensor before it")
        end += entry.size
    if end != size:
        raise ValueError(f"its header describes {end} bytes, the file has {size}")


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending rows -> (first, last) places of those that follow one another in the file."""
    cuts = [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1]
    edges = [0, *cuts, len(rows)]
    return list(zip(edges, edges[1:], strict=False)) if rows else []


def write_tensor_file(
    path: Path,
    layout: Layout,
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the tensors of `layout` one by one; `read` is asked for each when its turn comes.

    The same layout, tensors and metadata give the same bytes. Not synced to the disk: that is
    for `replace_file` to do.
    """
    order = sorted(layout, key=lambda name: (PRECEDENCE[layout[name][0]], name))
    with path.open("wb") as file:
        file.write(_header(order, layout, {"format": "pt"} if metadata is None else metadata))
        for name in order:
            _write(file, name, read(name), layout[name])


def _header(order: Sequence[str], layout: Layout, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = layout[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % LENGTH)  # so that the first tensor is aligned
    return len(text).to_bytes(LENGTH, "little") + text


def _write(
    file: BinaryIO, name: str, tensor: Tensor, planned: tuple[torch.dtype, tuple[int, ...]]
) -> None:
    if (found := (tensor.dtype, tuple(tensor.shape))) != planned:
        raise CheckpointError(f"{name} is {found} and not {planned}, as the header says")
    flat = tensor.detach().cpu().contiguous().view(-1)
    file.write(flat.view(torch.uint8).numpy().data)
