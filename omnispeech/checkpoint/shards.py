"""The tensors of a checkpoint directory: one model.safetensors, or an index and its shards."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from omnispeech.checkpoint.models_directory import bring_again
from omnispeech.checkpoint.reader import (
    Request,
    Tensors,
    Transfers,
    read_tensor,
    read_tensors,
    transfers_to,
)
from omnispeech.checkpoint.tensor_file import TensorFile
from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAMPLE = 4096  # bytes of each tensor that tell models apart


Wanted = Sequence[tuple[str, torch.dtype]]  # names of tensors, and the types they shall have


class TensorFiles(Protocol):
    """Named tensors on disk. `shape` and `dtype` read headers only, `read` one tensor."""

    @property
    def names(self) -> Collection[str]: ...

    @property
    def bytes_read(self) -> int: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor: ...

    def read_all(self, wanted: Wanted, device: torch.device, threads: int = 0) -> Tensors: ...

    def read_rows(self, name: str, rows: Sequence[int] | Tensor) -> Tensor: ...


class Shards:
    def __init__(self, directory: Path, device: torch.device) -> None:
        """Opens all files: what is missing or damaged is found here, before the long read.

        `device` is where the tensors go.
        """
        self.files = [TensorFile(path) for path in weight_files(directory)]
        self._places: dict[str, TensorFile] = {}
        for file in self.files:
            if twice := self._places.keys() & file.entries.keys():
                raise CheckpointError(f"{file.path} holds {min(twice)} a second time")
            self._places |= dict.fromkeys(file.in_order(), file)
        self._transfers = transfers_to(device)

    @property
    def names(self) -> Collection[str]:
        """In the order of the files and of the bytes in them."""
        return self._places.keys()

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read so far, headers not counted."""
        return sum(file.bytes_read for file in self.files)

    def identity(self, prefix: str = "") -> Iterator[bytes]:
        """File names and sizes, headers, and the first bytes of each tensor named `prefix`...

        To be hashed: tells two models apart without reading 16 GB; a copy has the same.
        """
        for file in self.files:
            yield f"{file.path.name} {file.size} {file.header_digest}".encode()
            for name, entry in sorted(file.entries.items()):
                if name.startswith(prefix):
                    start = torch.empty(min(SAMPLE, entry.size), dtype=torch.uint8)
                    file.read_bytes(name, start)
                    yield start.numpy().tobytes()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._places[name].entries[name].dtype

    def read(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Straight to the device; whole numbers (packed weights) keep their type."""
        return read_tensor(self._request(name, dtype), device, self._to(device))

    def read_all(self, wanted: Wanted, device: torch.device, threads: int = 0) -> Tensors:
        """As `read`, of several that follow one another; see `read_tensors`."""
        requests = [self._request(*one) for one in wanted]
        return read_tensors(requests, device, threads, self._to(device))

    def read_rows(self, name: str, rows: Sequence[int] | Tensor) -> Tensor:
        """rows [R] of a tensor [N, K] -> [R, K] on the CPU, as stored; only these are read."""
        return self._places[name].read_rows(name, rows)

    def _to(self, device: torch.device) -> Transfers | None:
        return self._transfers if device.type != "cpu" else None

    def _request(self, name: str, dtype: torch.dtype) -> Request:
        stored = self.dtype(name)
        return Request(self._places[name], name, dtype if stored.is_floating_point else stored)


def weight_files(directory: Path) -> list[Path]:
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not (directory / INDEX).is_file():
        pickled = any(directory.glob("*.bin"))
        raise CheckpointError(
            f"{directory} holds neither {SINGLE} nor {INDEX}"
            + ("; pickled weights (*.bin) are never read, convert them" if pickled else "")
        )
    names = sorted(set(_weight_map(directory / INDEX).values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{directory / INDEX} names {outside[0]!r} outside its directory")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}; "
            f"{bring_again(directory)}"
        )
    return [directory / name for name in names]


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    return {str(name): str(file) for name, file in weight_map.items()}
