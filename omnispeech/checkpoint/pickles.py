"""Published pickles: read as tensors alone, converted once to `.safetensors` beside them."""

import logging
import pickle
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omnispeech.checkpoint.files import replace_file
from omnispeech.checkpoint.reader import Request, read_tensors
from omnispeech.checkpoint.tensor_file import TensorFile
from omnispeech.errors import CheckpointError

logger = logging.getLogger(__name__)


def current_file(pickled: Path) -> Path:
    """What is read for a published pickle: its conversion, or the pickle, which may be missing."""
    converted = conversion_of(pickled)
    return converted if is_current(converted, pickled) else pickled


def conversion_of(pickled: Path) -> Path:
    return pickled.with_suffix(".safetensors")


def is_current(converted: Path, pickled: Path) -> bool:
    """Whether the conversion is there and was made from the pickle as it is now.

    Size and time of change tell: a hash would mean reading half a gigabyte at every start.
    """
    if not converted.exists():
        return False
    if not pickled.exists():
        return True
    return _metadata(converted) == _stamp(pickled)


def _stamp(pickled: Path) -> dict[str, str]:
    status = pickled.stat()
    return {"source_size": str(status.st_size), "source_mtime_ns": str(status.st_mtime_ns)}


def _metadata(converted: Path) -> dict[str, str]:
    try:
        with safe_open(converted, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as exc:
        raise _damaged(converted, exc) from exc


def read_conversion(converted: Path) -> dict[str, Tensor]:
    try:
        return read_whole(TensorFile(converted))
    except CheckpointError as exc:
        raise _damaged(converted, exc) from exc


def read_whole(file: TensorFile) -> dict[str, Tensor]:
    """In memory of its own: a mapped file would be read at the first reply, or change under it."""
    names = file.in_order()
    requests = [Request(file, name, file.entries[name].dtype) for name in names]
    with closing(read_tensors(requests, torch.device("cpu"))) as tensors:
        return dict(zip(names, tensors, strict=True))


def _damaged(converted: Path, exc: Exception) -> CheckpointError:
    return CheckpointError(f"{converted} is damaged ({exc}); delete it and start again")


def compare_conversion(
    pickled: Path, plain: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> None:
    """Raises CheckpointError for a conversion that holds other tensors than its pickle.

    One of an older pickle is made again by whoever loads it.
    plain: makes of the tensors of a pickle those of its conversion.
    """
    converted = current_file(pickled)
    if converted == pickled or not pickled.exists():
        return
    wanted, found = plain(read_pickle(pickled)), read_conversion(converted)
    if wanted.keys() != found.keys() or not all(_equal(wanted[n], found[n]) for n in wanted):
        raise CheckpointError(
            f"{converted} does not hold the tensors of {pickled.name}: delete it, the next start "
            "converts again"
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    """But for rounding: another processor may fold a weight norm to another last bit."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def write_conversion(weights: dict[str, Tensor], pickled: Path) -> None:
    converted = conversion_of(pickled)

    def write(path: Path) -> None:
        save_file(weights, path, _stamp(pickled))
        shutil.copymode(pickled, path)  # save_file makes it private to this user

    try:
        replace_file(converted, write)
        logger.info("converted %s", converted)
    except (OSError, SafetensorError) as exc:
        logger.warning(
            "%s cannot be written (%s): %s is converted again at every start",
            converted,
            exc,
            pickled.name,
        )


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save`d dictionary. Nothing else in the file is ever executed."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path} does not exist") from exc
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as exc:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors (never executed): {_first_line(exc)}"
        ) from exc
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} holds a {type(weights).__name__} and no named tensors")
    if wrong := [name for name, value in weights.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{path}: {wrong[0]!r} is no tensor")
    return dict(weights)


def _first_line(exc: Exception) -> str:
    return str(exc).strip().partition("\n")[0]
