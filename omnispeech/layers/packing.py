"""How quantized weights lie in files: AWQ GEMM, GEMV and GEMVFast, GPTQ v1, int8 (spec:
quantization 2.6 to 2.10). The only file that knows a nibble order.

Every format is read into, and written from, one plain meaning: `QuantizedWeight`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omnispeech.errors import CheckpointError
from omnispeech.layers.quantized_weight import QuantizedWeight, Scheme

__all__ = [
    "QuantizedWeight",
    "Scheme",
    "join_fields",
    "pack",
    "packed_dtypes",
    "packed_shapes",
    "split_fields",
    "unpack",
]

Tensors = Mapping[str, Tensor]  # by suffix: qweight, qzeros, scales, g_idx

# which two of eight columns each byte of a word holds, from the lowest nibble up
GEMM_PAIRS = ((0, 2), (4, 6), (1, 3), (5, 7))


@dataclass(frozen=True, slots=True)
class _Layout:
    dtypes: Mapping[str, torch.dtype]
    multiples: Callable[[Scheme], tuple[int, int]]  # what N and K must be multiples of
    shapes: Callable[[Scheme, int, int], dict[str, tuple[int, ...]]]
    size: Callable[[Scheme, Tensor], tuple[int, int]]  # (N, K) of a packed qweight
    pack: Callable[[QuantizedWeight, Scheme], dict[str, Tensor]]
    unpack: Callable[[Tensors, Scheme], QuantizedWeight]


def packed_shapes(scheme: Scheme, n: int, k: int) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a linear with `n` outputs and `k` inputs, keyed by its suffix.

    Raises CheckpointError if the layout cannot hold such a linear.
    """
    layout = LAYOUTS[scheme.layout]
    if k % scheme.columns(k):
        raise CheckpointError(
            f"{k} input columns are no multiple of the group size {scheme.group_size}"
        )
    for what, value, multiple in zip("NK", (n, k), layout.multiples(scheme), strict=True):
        if value % multiple:
            side = "outputs" if what == "N" else "inputs"
            raise CheckpointError(
                f"layout {scheme.layout} holds a multiple of {multiple} {side}, not {value}; "
                "leave this linear unconverted or choose another layout"
            )
    return layout.shapes(scheme, n, k)


def packed_dtypes(scheme: Scheme) -> dict[str, torch.dtype]:
    """Type of each tensor of a linear, keyed by its suffix."""
    return dict(LAYOUTS[scheme.layout].dtypes)


def pack(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of one linear as a file holds them, keyed by suffix.

    Raises CheckpointError if the layout has no place for what `weight` holds.
    """
    n, k = weight.codes.shape
    packed_shapes(scheme, n, k)
    groups = (n, k // scheme.columns(k))
    if weight.bits != scheme.bits or weight.scales.shape != groups:
        raise CheckpointError(
            f"a weight of {weight.bits} bits and {weight.scales.shape[1]} groups in each row is "
            f"to be stored as {scheme.bits} bits and {groups[1]} groups, layout {scheme.layout}"
        )
    if weight.group_of is not None and scheme.layout != "gptq":
        raise CheckpointError(
            f"layout {scheme.layout} cannot say which group a column is of; "
            "use static groups or layout gptq"
        )
    return LAYOUTS[scheme.layout].pack(weight, scheme)


def unpack(tensors: Tensors, scheme: Scheme) -> QuantizedWeight:
    """The meaning of one linear's tensors, keyed by suffix as `pack` returns them.

    Raises CheckpointError if one is missing or has not the shape or type of the layout.
    """
    layout = LAYOUTS[scheme.layout]
    if missing := layout.dtypes.keys() - tensors.keys():
        raise CheckpointError(f"layout {scheme.layout} needs {min(missing)}, which is missing")
    for suffix, dtype in layout.dtypes.items():
        if tensors[suffix].dtype != dtype:
            raise CheckpointError(f"{suffix} is {tensors[suffix].dtype}; allowed: {dtype}")
    if tensors["qweight"].ndim != 2:
        raise CheckpointError(f"qweight has {tensors['qweight'].ndim} dimensions; allowed: 2")
    for suffix, shape in packed_shapes(scheme, *layout.size(scheme, tensors["qweight"])).items():
        if tuple(tensors[suffix].shape) != shape:
            raise CheckpointError(
                f"{suffix} is {list(tensors[suffix].shape)}, but beside a qweight of "
                f"{list(tensors['qweight'].shape)} it must be {list(shape)}"
            )
    return layout.unpack(tensors, scheme)


def join_fields(fields: Tensor, bits: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """[..., M] uint8 of 4 or 8 bits -> whole numbers that hold them from the lowest bit up."""
    if bits == 4:
        fields = fields[..., 0::2] | (fields[..., 1::2] << 4)
    # flat, because a side of length one has a stride that no other type can be seen through
    return fields.flatten().view(dtype).view(*fields.shape[:-1], -1)


def split_fields(words: Tensor, bits: int) -> Tensor:
    """Inverse of `join_fields`, for whole numbers of any width."""
    octets = words.flatten().view(torch.uint8).view(*words.shape[:-1], -1)
    if bits == 8:
        return octets
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)


def _join_columns(fields: Tensor) -> Tensor:
    """[N, R] codes of four bits -> [R, N / 8] int32, eight columns of a GEMM file in each."""
    eights = fields.view(-1, 8, fields.shape[1])
    pairs = (eights[:, low] | (eights[:, high] << 4) for low, high in GEMM_PAIRS)
    octets = torch.stack(list(pairs), dim=1).flatten(0, 1)  # [N / 2, R]
    return octets.t().flatten().view(torch.int32).view(fields.shape[1], -1)


def _split_columns(words: Tensor) -> Tensor:
    """Inverse of `_join_columns`. Whole bytes change places, half as many as there are codes."""
    octets = words.flatten().view(torch.uint8).view(len(words), -1).t().contiguous()
    octets = octets.view(-1, 4, len(words))  # [N / 8, 4, R]
    eights = octets.new_empty(len(octets), 8, len(words))
    for place, (low, high) in enumerate(GEMM_PAIRS):
        torch.bitwise_and(octets[:, place], 15, out=eights[:, low])
        torch.bitwise_right_shift(octets[:, place], 4, out=eights[:, high])
    return eights.flatten(0, 1)


def _gemm_shapes(scheme: Scheme, n: int, k: int) -> dict[str, tuple[int, ...]]:
    groups = k // scheme.columns(k)
    return {"qweight": (k, n // 8), "qzeros": (groups, n // 8), "scales": (groups, n)}


def _pack_gemm(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    return {
        "qweight": _join_columns(weight.codes),
        "qzeros": _join_columns(weight.zeros),
        "scales": weight.scales.t().contiguous(),
    }


def _unpack_gemm(tensors: Tensors, scheme: Scheme) -> QuantizedWeight:
    return QuantizedWeight(
        codes=_split_columns(tensors["qweight"]),
        zeros=_split_columns(tensors["qzeros"]),
        scales=tensors["scales"].t().contiguous(),
        bits=4,
    )


def _padded_groups(scheme: Scheme, k: int) -> int:
    """GEMV and GEMVFast keep room for more groups than there are, filled with zero."""
    columns = scheme.columns(k)
    words = -(-(k // columns) // 8)
    step = {32: 4, 64: 2}.get(columns, 1)
    return 8 * step * -(-words // step)


def _gemv_shapes(scheme: Scheme, n: int, k: int) -> dict[str, tuple[int, ...]]:
    groups = _padded_groups(scheme, k)
    return {"qweight": (n, k // 8), "qzeros": (n, groups // 8), "scales": (n, groups)}


def _pack_gemv(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    groups = _padded_groups(scheme, weight.codes.shape[1])
    return {
        "qweight": join_fields(weight.codes, 4),
        "qzeros": join_fields(_pad(weight.zeros, groups), 4),
        "scales": _pad(weight.scales, groups),
    }


def _unpack_gemv(tensors: Tensors, scheme: Scheme) -> QuantizedWeight:
    codes = split_fields(tensors["qweight"], 4)
    groups = codes.shape[1] // scheme.columns(codes.shape[1])
    return QuantizedWeight(
        codes=codes,
        zeros=split_fields(tensors["qzeros"], 4)[:, :groups].contiguous(),
        scales=tensors["scales"][:, :groups].contiguous(),
        bits=4,
    )


def _pad(values: Tensor, groups: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, groups - values.shape[1]))


def _gemv_fast_shapes(scheme: Scheme, n: int, k: int) -> dict[str, tuple[int, ...]]:
    groups = _padded_groups(scheme, k)
    return {"qweight": (n // 4, k), "qzeros": (groups, n), "scales": (groups, n)}


def _pack_gemv_fast(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    n, k = weight.codes.shape
    groups = _padded_groups(scheme, k)
    lanes = weight.codes.view(n, k // 32, 4, 8).transpose(2, 3)  # lane 4 b + a takes k = 8 a + b
    fours = lanes.reshape(n // 4, 4, k // 64, 64).transpose(1, 2)  # [N/4, K/64, 4, 64]
    offsets = (-weight.scales.float() * weight.zeros.float()).half()
    if not offsets.isfinite().all():
        raise CheckpointError(
            f"a scale of {weight.scales.max().item():g} times its zero point is more than the "
            "float16 of layout gemv_fast; use gemm"
        )
    return {
        "qweight": join_fields(fours.reshape(n // 4, 4 * k), 4, torch.int16),
        "qzeros": _pad(offsets, groups).t().contiguous(),
        "scales": _pad(weight.scales, groups).t().contiguous(),
    }


def _unpack_gemv_fast(tensors: Tensors, scheme: Scheme) -> QuantizedWeight:
    rows, k = tensors["qweight"].shape
    groups = k // scheme.columns(k)
    fours = split_fields(tensors["qweight"], 4).view(rows, k // 64, 4, 64).transpose(1, 2)
    lanes = fours.reshape(rows * 4, k // 32, 8, 4).transpose(2, 3)
    scales = tensors["scales"][:groups].t().contiguous()
    offsets = tensors["qzeros"][:groups].t().float()
    # the file holds -scale * zero, rounded: far nearer to its whole number than to the next one
    zeros = (-offsets / scales.float()).nan_to_num(0).round()
    return QuantizedWeight(
        codes=lanes.reshape(rows * 4, k), zeros=zeros.to(torch.uint8), scales=scales, bits=4
    )


def _gptq_shapes(scheme: Scheme, n: int, k: int) -> dict[str, tuple[int, ...]]:
    groups = k // scheme.columns(k)
    return {
        "qweight": (k * scheme.bits // 32, n),
        "qzeros": (groups, n * scheme.bits // 32),
        "scales": (groups, n),
        "g_idx": (k,),
    }


def _pack_gptq(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """v1 keeps zero - 1; servers read it only where all zeros are the middle code."""
    middle = 2 ** (scheme.bits - 1)
    if not (weight.zeros == middle).all():
        raise CheckpointError(
            f"layout gptq is written symmetric, with every zero point {middle}; "
            "quantize without zero points or use gemm"
        )
    k = weight.codes.shape[1]
    group_of = _neighbours(scheme, k) if weight.group_of is None else weight.group_of
    return {
        "qweight": join_fields(weight.codes, scheme.bits).t().contiguous(),
        "qzeros": join_fields(weight.zeros.t() - 1, scheme.bits),
        "scales": weight.scales.t().contiguous(),
        "g_idx": group_of.to(weight.codes.device, torch.int32),
    }


def _unpack_gptq(tensors: Tensors, scheme: Scheme) -> QuantizedWeight:
    scales, g_idx = tensors["scales"], tensors["g_idx"]
    if g_idx.min() < 0 or g_idx.max() >= len(scales):
        raise CheckpointError(
            f"g_idx names groups {g_idx.min()} to {g_idx.max()}, but there are {len(scales)}"
        )
    natural = torch.equal(g_idx.cpu(), _neighbours(scheme, len(g_idx)))
    zeros = split_fields(tensors["qzeros"], scheme.bits).t() + 1
    return QuantizedWeight(
        codes=split_fields(tensors["qweight"].t(), scheme.bits),
        zeros=(zeros & (2**scheme.bits - 1)).contiguous(),  # a zero of 0 is stored as -1
        scales=scales.t().contiguous(),
        bits=scheme.bits,
        group_of=None if natural else g_idx,
    )


def _neighbours(scheme: Scheme, k: int) -> Tensor:
    """[K] int32, the group of each column when neighbours share one."""
    return torch.arange(k, dtype=torch.int32) // scheme.columns(k)


def _int8_shapes(scheme: Scheme, n: int, k: int) -> dict[str, tuple[int, ...]]:
    return {"qweight": (n, k), "scales": (n, 1)}


def _pack_int8(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    if not (weight.zeros == 128).all():
        raise CheckpointError("layout int8 has no zero points, every one must be 128")
    return {"qweight": (weight.codes ^ 128).view(torch.int8), "scales": weight.scales.contiguous()}


def _unpack_int8(tensors: Tensors, scheme: Scheme) -> QuantizedWeight:
    return QuantizedWeight(
        codes=tensors["qweight"].contiguous().view(torch.uint8) ^ 128,
        zeros=torch.full_like(tensors["scales"], 128, dtype=torch.uint8),
        scales=tensors["scales"],
        bits=8,
    )


_AWQ = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}

LAYOUTS = {
    "gemm": _Layout(
        dtypes=_AWQ,
        multiples=lambda scheme: (8, 1),
        shapes=_gemm_shapes,
        size=lambda scheme, qweight: (qweight.shape[1] * 8, qweight.shape[0]),
        pack=_pack_gemm,
        unpack=_unpack_gemm,
    ),
    "gemv": _Layout(
        dtypes=_AWQ,
        multiples=lambda scheme: (1, 8),
        shapes=_gemv_shapes,
        size=lambda scheme, qweight: (qweight.shape[0], qweight.shape[1] * 8),
        pack=_pack_gemv,
        unpack=_unpack_gemv,
    ),
    "gemv_fast": _Layout(
        dtypes={"qweight": torch.int16, "qzeros": torch.float16, "scales": torch.float16},
        multiples=lambda scheme: (4, 64),
        shapes=_gemv_fast_shapes,
        size=lambda scheme, qweight: (qweight.shape[0] * 4, qweight.shape[1]),
        pack=_pack_gemv_fast,
        unpack=_unpack_gemv_fast,
    ),
    "gptq": _Layout(
        dtypes={**_AWQ, "g_idx": torch.int32},
        multiples=lambda scheme: (32 // scheme.bits, 32 // scheme.bits),
        shapes=_gptq_shapes,
        size=lambda scheme, qweight: (qweight.shape[1], qweight.shape[0] * 32 // scheme.bits),
        pack=_pack_gptq,
        unpack=_unpack_gptq,
    ),
    "int8": _Layout(
        dtypes={"qweight": torch.int8, "scales": torch.float16},
        multiples=lambda scheme: (1, 1),
        shapes=_int8_shapes,
        size=lambda scheme, qweight: (qweight.shape[0], qweight.shape[1]),
        pack=_pack_int8,
        unpack=_unpack_int8,
    ),
}
