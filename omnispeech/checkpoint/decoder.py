"""A speech decoder on disk: published as two pickles, converted once, loaded exactly."""

import logging
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omnispeech.checkpoint.decoder_config import read_config
from omnispeech.checkpoint.files import assign_weights, build_on_meta, replace_file
from omnispeech.errors import CheckpointError
from omnispeech.models.flow import Flow
from omnispeech.models.hift import HiFT
from omnispeech.models.speech_decoder import SpeechDecoder

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)


def load_decoder(
    directory: Path, device: torch.device | str = "cpu", *, convert: bool = True
) -> SpeechDecoder:
    """Reads `config.yaml`, `flow` and `hift` in float32.

    A `.pt` is read once: `convert` writes the same tensors as `.safetensors` beside it, and later
    loads read only those for as long as the `.pt` does not change.
    """
    flow_config, hift_config = read_config(directory / "config.yaml")
    flow = _load(lambda: Flow(flow_config), directory / "flow.pt", device, convert)
    hift = _load(lambda: HiFT(hift_config), directory / "hift.pt", device, convert)
    return SpeechDecoder(flow, hift)


def _load(
    make: Callable[[], Network], pickled: Path, device: torch.device | str, convert: bool
) -> Network:
    model = build_on_meta(make)
    converted = pickled.with_suffix(".safetensors")
    if is_current(converted, pickled):
        assign_weights(model, _read(converted), str(converted))
    else:
        weights = convert_weights(read_pickle(pickled))
        assign_weights(model, weights, str(pickled))
        if convert:
            _write(converted, weights, pickled)
    return model.to(device)  # type: ignore[return-value]


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


def _read(converted: Path) -> dict[str, Tensor]:
    try:
        return load_file(converted)
    except SafetensorError as exc:
        raise _damaged(converted, exc) from exc


def _damaged(converted: Path, exc: Exception) -> CheckpointError:
    return CheckpointError(f"{converted} is damaged ({exc}); delete it and start again")


def _write(converted: Path, weights: dict[str, Tensor], pickled: Path) -> None:
    def write(path: Path) -> None:
        save_file(weights, path, _stamp(pickled))
        shutil.copymode(pickled, path)  # save_file makes it private to this user

    try:
        replace_file(converted, write)
        logger.info("converted %s", converted)
    except (OSError, SafetensorError) as exc:
        logger.warning(
            "%s cannot be written (%s): the .pt is converted again at every start", converted, exc
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


def convert_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain float32 weights by their names in the model: no prefix, no weight norm."""
    # Vocoders of later CosyVoice releases are saved with everything under one name.
    prefix = "generator." if all(name.startswith("generator.") for name in weights) else ""
    plain = {name.removeprefix(prefix): value.detach().float() for name, value in weights.items()}
    for name in [name for name in plain if name.endswith(".weight_g")]:
        base = name.removesuffix("_g")
        if f"{base}_v" in plain:
            plain[base] = fold_weight_norm(plain.pop(name), plain.pop(f"{base}_v"))
    # safetensors takes no views of a common storage
    return {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in plain.items()
    }


def fold_weight_norm(g: Tensor, v: Tensor) -> Tensor:
    """g [C, 1, 1], v [C, ...] -> [C, ...]; dimension 0 also where it is the input channel."""
    length = v.flatten(1).norm(dim=1).view(-1, *[1] * (v.dim() - 1))  # [C, 1, 1]
    return v * (g / length)
