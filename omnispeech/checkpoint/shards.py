"""The tensors of a checkpoint directory: one model.safetensors, or an index and its shards."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class TensorFiles(Protocol):
    """Named tensors on disk. `shape` reads headers only, `read` one tensor."""

    @property
    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor: ...


class Shards:
    def __init__(self, directory: Path, device: torch.device) -> None:
        """Opens all files: what is missing or damaged is found here, before the long read."""
        self._device = device
        self._files: dict[str, Any] = {}
        for path in weight_files(directory):
            with _damage_of(path):
                file: Any = safe_open(path, framework="pt", device=str(device))
                names = list(file.keys())
            if twice := self._files.keys() & names:
                raise CheckpointError(f"{path} holds {min(twice)} a second time")
            self._files |= dict.fromkeys(names, file)

    @property
    def names(self) -> Collection[str]:
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Straight to the device; whole numbers (packed weights) keep their type."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor.to(device, dtype if tensor.is_floating_point() else None)


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
            "fetch them again"
        )
    return [directory / name for name in names]


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    return {str(name): str(file) for name, file in weight_map.items()}


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{path} is damaged: {exc}; fetch it again") from exc
