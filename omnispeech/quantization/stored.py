"""What a layer is once it is stored: packed linears and float16 for the rest, and their digests."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.errors import CheckpointError
from omnispeech.layers.packing import QuantizedWeight, Scheme, pack, packed_dtypes, unpack
from omnispeech.quantization.methods.salient import SalientColumns

ROWS = 1024  # rows of a weight that are made float at a time
PIECE = 1 << 22  # elements of a tensor that are converted at a time


def to_half(tensor: Tensor, name: str) -> Tensor:
    """As float16; raises CheckpointError for what that cannot hold."""
    check_half_range(tensor, name)
    return tensor.detach().to("cpu", torch.float16)


def half_in_place(tensor: Tensor, name: str) -> Tensor:
    """`to_half` for a large tensor on the host: uses its memory up, so that there is no second.

    Only what this returns is to be used afterwards.
    """
    if tensor.dtype == torch.float16 or tensor.dtype.itemsize < torch.float16.itemsize:
        return to_half(tensor, name)
    check_half_range(tensor, name)
    flat = tensor.contiguous().view(-1)
    halves = flat.view(torch.float16)
    for start in range(0, len(flat), PIECE):  # what is written lies never beyond what was read
        piece = flat[start : start + PIECE].to(torch.float16)
        halves[start : start + len(piece)] = piece
    return halves[: len(flat)].view(tensor.shape)


def check_half_range(tensor: Tensor, name: str) -> None:
    if not tensor.numel():
        return
    low, high = (value.item() for value in tensor.aminmax())
    limit = torch.finfo(torch.float16).max
    if not (-limit <= low and high <= limit):  # false for nan, too
        raise CheckpointError(
            f"{name} has values from {low:g} to {high:g}, the first such in row "
            f"{_first_row_beyond(tensor, limit)}; stored as float16 they must be numbers within "
            f"{limit:g}: fetch the model again, or take one that was trained for float16"
        )


def check_outside(source: LanguageFiles) -> None:
    """Raises CheckpointError if what lies beside the layers is nothing that float16 can hold."""
    for name in source.outside_names():
        check_half_range(source.read(name, source.dtype(name)), name)


def _first_row_beyond(tensor: Tensor, limit: float) -> int:
    rows = enumerate(tensor.view(len(tensor), -1))
    return next(i for i, row in rows if not bool((row.abs() <= limit).all()))


def stored_tensors(
    prefix: str,
    weights: Mapping[str, QuantizedWeight],
    plain: Mapping[str, Tensor],
    scheme: Scheme,
) -> dict[str, Tensor]:
    """The tensors of one layer by their name in the file; `prefix` ends with a dot."""
    tensors = {
        f"{prefix}{name}.{suffix}": tensor.cpu()
        for name, weight in weights.items()
        for suffix, tensor in pack(weight, scheme).items()
    }
    return tensors | {prefix + name: tensor for name, tensor in plain.items()}


def salient_tensors(prefix: str, salient: Mapping[str, SalientColumns]) -> dict[str, Tensor]:
    """Of one layer, by their name in the sidecar."""
    tensors: dict[str, Tensor] = {}
    for name, columns in salient.items():
        tensors[f"{prefix}{name}.indices"] = columns.columns.cpu().to(torch.int32)
        tensors[f"{prefix}{name}.residual"] = columns.residual.cpu()
        tensors[f"{prefix}{name}.scales"] = columns.scales.cpu()
    return tensors


def read_weight(read: Callable[[str], Tensor], module: str, scheme: Scheme) -> QuantizedWeight:
    """One linear of a file, as the server unpacks it."""
    return unpack({s: read(f"{module}.{s}") for s in packed_dtypes(scheme)}, scheme)


def install(
    block: nn.Module, weights: Mapping[str, QuantizedWeight], plain: Mapping[str, Tensor]
) -> None:
    """Makes `block` compute exactly what the stored tensors mean; names relative to the layer."""
    own = dict(block.named_parameters())
    with torch.no_grad():
        for name, tensor in plain.items():
            own[name].copy_(tensor)
        for name, weight in weights.items():
            _dequantize_into(own[f"{name}.weight"], weight)


def _dequantize_into(target: Tensor, weight: QuantizedWeight) -> None:
    for start in range(0, len(target), ROWS):
        rows = slice(start, start + ROWS)
        part = QuantizedWeight(
            codes=weight.codes[rows],
            zeros=weight.zeros[rows],
            scales=weight.scales[rows],
            bits=weight.bits,
            group_of=weight.group_of,
        )
        target[rows].copy_(part.dequantize())


def weight_digest(weight: QuantizedWeight) -> str:
    """sha256 of what a linear means, whatever layout holds it."""
    n, k = weight.codes.shape
    groups = weight.scales.shape[1]
    group_of = weight.group_of
    if group_of is None:
        group_of = torch.arange(k, dtype=torch.int32) // (k // groups)
    digest = hashlib.sha256(f"{weight.bits} {n} {k} {groups}".encode())
    for tensor in (weight.codes, weight.zeros, weight.scales, group_of.to(torch.int32)):
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data
