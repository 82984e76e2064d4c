"""How quantized weights lie in files: AWQ GEMM, GEMV and GEMVFast, GPTQ v1, int8 (spec:
quantization 2.6 to 2.10). The only file that knows a nibble order.

Every format is read into, and written from, one plain meaning: `QuantizedWeight`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
