"""What quantized weights mean, and which ways of storing them there are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from omnispeech.errors import CheckpointError

# layout -> bits that it holds
LAYOUT_BITS = {"gemm": (4,), "gemv": (4,), "gemv_fast": (4,), "gptq": (4, 8), "int8": (8,)}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QuantizedWeight:
    """w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], where g is the group of column k."""

    codes: Tensor  # [N, K] uint8, 0 to 2 ** bits - 1
    zeros: Tensor  # [N, G] uint8
    scales: Tensor  # [N, G] float16
    bits: int
    group_of: Tensor | None = None  # [K] int32; None: K / G neighbouring columns share a group

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], computed in float32."""
        n, k = self.codes.shape
        groups = self.scales.shape[1]
        if self.group_of is None:
            codes = self.codes.view(n, groups, k // groups).float()
            grouped = (codes - self.zeros[..., None].float()) * self.scales[..., None].float()
            return grouped.view(n, k).to(dtype)
        group_of = self.group_of.long()
        zeros, scales = self.zeros.float()[:, group_of], self.scales.float()[:, group_of]
        return ((self.codes.float() - zeros) * scales).to(dtype)


@dataclass(frozen=True, slots=True)
class Form:
    """Of a weight, what the tensors that a kernel keeps of it do not tell by themselves."""

    rows: int
    columns: int
    bits: int

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "Form":
        rows, columns = weight.codes.shape
        return cls(rows, columns, weight.bits)

    @property
    def joined(self) -> bool:
        """Whether the reference keeps two codes in each byte."""
        return self.bits == 4 and self.columns % 2 == 0


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the linears of a checkpoint are stored.

    layout: gemm, gemv, gemv_fast (AutoAWQ's versions, 4 bit), gptq (v1, 4 or 8 bit) or int8
        (8 bit, one scale for each row).
    group_size: so many neighbouring columns share a scale; -1: the whole row does.

    Raises CheckpointError for a combination that no file of that layout holds.
    """

    layout: str
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.layout not in LAYOUT_BITS:
            known = ", ".join(LAYOUT_BITS)
            raise CheckpointError(f"unknown layout {self.layout!r}; known: {known}")
        if self.bits not in (allowed := LAYOUT_BITS[self.layout]):
            known = " or ".join(map(str, allowed))
            raise CheckpointError(f"layout {self.layout} holds {known} bits, not {self.bits}")
        if self.group_size != -1:
            self._check_columns(self.group_size)

    def _check_columns(self, size: int) -> None:
        if size < 1:
            raise CheckpointError(
                f"group size {size} is wrong; allowed: -1 (whole row) or 1 and up"
            )
        if self.layout == "int8":
            raise CheckpointError(
                f"layout int8 has one scale for each row, group size -1, not {size}"
            )
        if self.layout in ("gemv", "gemv_fast") and size not in (32, 64) and size < 128:
            raise CheckpointError(
                f"layout {self.layout} holds groups of 32, 64 or 128 and more, not {size}"
            )

    def columns(self, k: int) -> int:
        """How many of `k` input columns share a scale.

        Raises CheckpointError if the layout has no groups of that size.
        """
        if self.group_size != -1:
            return self.group_size
        if self.layout != "int8":
            self._check_columns(k)
        return k
