"""Whole files and exact weights: nothing half-written is read, nothing missing is invented."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from omnispeech.checkpoint.whole_file import replace_file as replace_file
from omnispeech.checkpoint.whole_file import size_text as size_text
from omnispeech.errors import CheckpointError


def build_on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The module without memory: no random initialisation, no copy beside the weights to come."""
    with torch.device("meta"), _WithoutInitialisation():
        return make().eval().requires_grad_(False)


class _WithoutInitialisation(TorchFunctionMode):
    """torch.nn.init does nothing: on meta it would load 800 modules and 80 MB to fill no memory."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def assign_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Puts `weights` in place of the meta tensors of `model`, without a copy, if they fit."""
    check_weights(model, {name: tuple(tensor.shape) for name, tensor in weights.items()}, source)
    model.load_state_dict(weights, assign=True)


def check_weights(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises CheckpointError, with every missing, unexpected and misshapen tensor.

    `source` names the file or directory in the message.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if complaints := misfits(wanted, shapes):
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(complaints)}")


def misfits(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """A complaint about all missing, one about all unexpected and one about all misshapen."""
    return [
        *listed("missing", wanted.keys() - found.keys()),
        *listed("unexpected", found.keys() - wanted.keys()),
        *listed(
            "misshapen",
            (
                f"{name} {list(found[name])} instead of {list(wanted[name])}"
                for name in wanted.keys() & found.keys()
                if found[name] != wanted[name]
            ),
        ),
    ]


def listed(kind: str, names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    if not ordered:
        return []
    return [f"{len(ordered)} {kind}: {', '.join(ordered)}"]


def held_bytes(model: nn.Module) -> int:
    """Memory of all parameters and buffers; what two names share counts once, meta not at all."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())
