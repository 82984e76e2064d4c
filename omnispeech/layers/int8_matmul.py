"""Symmetric 8-bit weights, with one scale for each row or for each group of columns.

On a CPU all is computed in bfloat16, whatever x is, as torch's kernels for 4 bits do it: so the
precision is the same for every batch. A few rows go through torch's int8 kernel, once for each
group of columns; more rows are multiplied with weights that are dequantized a cache-full at a time.
Elsewhere there is no kernel, and the dtype of x is computed in.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from omnispeech.layers.packing import QuantizedWeight
from omnispeech.layers.quantized_weight import Form
from omnispeech.layers.reference_matmul import multiply_in_shares

# Up to here torch's kernel wins: measured, 3072 x 4096 on one core of an EPYC 9004, in groups of
# 128 columns and in whole rows.
SMALL_BATCH = 16
KERNEL_COLUMNS = 32  # the kernel reads so many at a time, without a look at where a row ends


class Int8Matmul(nn.Module):
    """x [T, K] -> [T, N] in the dtype of x, on a CPU computed in bfloat16."""

    name = "torch int8"
    codes: Tensor  # [G, N, K / G] int8
    scales: Tensor  # [G, N] float16

    def __init__(self, weight: QuantizedWeight, device: torch.device) -> None:
        """For a weight that `obstacle` has nothing against."""
        super().__init__()
        n, k = weight.codes.shape
        groups = weight.scales.shape[1]
        codes = (weight.codes.to(device) ^ 128).view(torch.int8)  # code - 128
        codes = codes.view(n, groups, k // groups).transpose(0, 1).contiguous()
        self._hold({"codes": codes, "scales": weight.scales.to(device).t().contiguous()})

    @classmethod
    def restore(cls, form: Form, buffers: Mapping[str, Tensor]) -> "Int8Matmul":
        """From the buffers of one that was built."""
        matmul = cls.__new__(cls)
        nn.Module.__init__(matmul)
        matmul._hold(buffers)
        return matmul

    def _hold(self, buffers: Mapping[str, Tensor]) -> None:
        self.register_buffer("codes", buffers["codes"], persistent=False)
        self.register_buffer("scales", buffers["scales"], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self._multiply_rows(x)
        half = x.to(torch.bfloat16)
        fits = self.codes.shape[2] % KERNEL_COLUMNS == 0
        small = fits and len(x) <= SMALL_BATCH
        return (self._multiply_groups(half) if small else self._multiply_rows(half)).to(x.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K]"""
        return self._rows(slice(None), dtype)

    def _rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        codes = self.codes[:, rows].transpose(0, 1).to(dtype)  # [N, G, K / G]
        scales = self.scales[:, rows].t().to(dtype)
        return codes.mul_(scales[..., None]).flatten(1)

    def _multiply_rows(self, x: Tensor) -> Tensor:
        return multiply_in_shares(x, self._rows, self.codes.shape[1])

    def _multiply_groups(self, x: Tensor) -> Tensor:
        groups, n, columns = self.codes.shape
        parts = x.view(len(x), groups, columns).transpose(0, 1).contiguous()  # [G, T, K / G]
        scales = self.scales.to(x.dtype)
        y = x.new_zeros(len(x), n, dtype=torch.float32)
        for part, codes, scale in zip(parts, self.codes, scales, strict=True):
            y += torch.ops.aten._weight_int8pack_mm(part, codes, scale)
        return y


def obstacle(weight: QuantizedWeight) -> str | None:
    """Why this 8-bit weight has no such form, if so."""
    if weight.group_of is not None:
        return "its groups differ in size"
    if not (weight.zeros == 128).all():
        return "its zero points are not all 128"
    return None
