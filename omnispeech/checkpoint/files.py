"""Whole files and exact weights: nothing half-written is read, nothing missing is invented."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from omnispeech.errors import CheckpointError


def replace_file(target: Path, write: Callable[[Path], None]) -> None:
    """`target` appears whole or not at all: written beside, synced, renamed."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def build_on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The module without memory: no random initialisation, no copy beside the weights to come."""
    with torch.device("meta"):
        return make().eval().requires_grad_(False)


def assign_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Puts `weights` in place of the meta tensors of `model`, without a copy, if they fit."""
    check_weights(model, {name: tuple(tensor.shape) for name, tensor in weights.items()}, source)
    model.load_state_dict(weights, assign=True)


def check_weights(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises CheckpointError, with every missing, unexpected and misshapen tensor.

    `source` names the file or directory in the message.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    complaints = [
        *_listed("missing", wanted.keys() - shapes.keys()),
        *_listed("unexpected", shapes.keys() - wanted.keys()),
        *_listed(
            "misshapen",
            (
                f"{name} {list(shapes[name])} instead of {list(wanted[name])}"
                for name in wanted.keys() & shapes.keys()
                if shapes[name] != wanted[name]
            ),
        ),
    ]
    if complaints:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(complaints)}")


def _listed(kind: str, names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    if not ordered:
        return []
    return [f"{len(ordered)} {kind}: {', '.join(ordered)}"]
