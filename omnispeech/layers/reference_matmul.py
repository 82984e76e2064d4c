"""Dequantize and multiply, in plain torch: what every kernel is compared with."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnispeech.layers.packing import QuantizedWeight, join_fields, split_fields
from omnispeech.layers.quantized_weight import Form

# Weights dequantized at a time. On a CPU they stay in its cache, which is worth a factor of 20.
SHARE = {"cpu": 2**20}
SHARE_ELSEWHERE = 2**26


class ReferenceMatmul(nn.Module):
    """x [T, K] -> [T, N] in the dtype of x, for every weight there is."""

    name = "reference"
    codes: Tensor  # [N, K] uint8, or [N, K / 2] with two codes of 4 bits in each byte
    zeros: Tensor
    scales: Tensor
    group_of: Tensor | None

    def __init__(self, weight: QuantizedWeight, device: torch.device) -> None:
        super().__init__()
        form = Form.of(weight)
        codes = weight.codes.to(device)
        buffers = {
            "codes": join_fields(codes, 4, torch.uint8) if form.joined else codes,
            "zeros": weight.zeros.to(device),
            "scales": weight.scales.to(device),
        }
        if weight.group_of is not None:
            buffers["group_of"] = weight.group_of.to(device)
        self._hold(form, buffers)

    @classmethod
    def restore(cls, form: Form, buffers: Mapping[str, Tensor]) -> "ReferenceMatmul":
        """From the buffers of one that was built."""
        matmul = cls.__new__(cls)
        nn.Module.__init__(matmul)
        matmul._hold(form, buffers)
        return matmul

    def _hold(self, form: Form, buffers: Mapping[str, Tensor]) -> None:
        self.bits, self.rows, self.joined = form.bits, form.rows, form.joined
        for name in ("codes", "zeros", "scales", "group_of"):
            self.register_buffer(name, buffers.get(name), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return multiply_in_shares(x, self._rows, self.rows)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K]"""
        return self._rows(slice(None), dtype)

    def _rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        codes = self.codes[rows]
        return QuantizedWeight(
            codes=split_fields(codes, 4) if self.joined else codes,
            zeros=self.zeros[rows],
            scales=self.scales[rows],
            bits=self.bits,
            group_of=self.group_of,
        ).dequantize(dtype)


def multiply_in_shares(x: Tensor, rows: Callable[[slice, torch.dtype], Tensor], n: int) -> Tensor:
    """x [T, K] times `n` weight rows, which `rows` dequantizes as they are asked for: [T, N]."""
    step = max(1, SHARE.get(x.device.type, SHARE_ELSEWHERE) // max(1, x.shape[1]))
    y = x.new_empty(len(x), n)
    for start in range(0, n, step):
        share = slice(start, start + step)
        y[:, share] = F.linear(x, rows(share, x.dtype))
    return y
