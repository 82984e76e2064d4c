"""A linear layer with quantized weights: picks how to multiply, once, when it is built.

The weight is repacked into the form of its kernel, and only that form stays in memory.
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.layers import int4_matmul, int8_matmul
from omnispeech.layers.int4_matmul import Int4Matmul
from omnispeech.layers.int8_matmul import Int8Matmul
from omnispeech.layers.packing import QuantizedWeight
from omnispeech.layers.quantized_weight import Form
from omnispeech.layers.reference_matmul import ReferenceMatmul

Salient = tuple[Tensor, Tensor, Tensor]  # columns [S], int8 residuals [N, S], scales [S]

# AutoAWQ's names for its kernels: the work is done by torch's, whatever the file is packed like
KERNELS = {
    "auto": "torch",
    "torch": "torch",
    "reference": "reference",
    "gemm": "torch",
    "gemv": "torch",
    "gemv_fast": "torch",
}
# names that others know, and the package that has such a kernel; any case, with or without _
FOREIGN = {
    "marlin": "gptqmodel",
    "exllama": "gptqmodel",
    "exllama_v2": "gptqmodel",
    "ipex": "intel_extension_for_pytorch",
    "gemlite": "gemlite",
}


MATMULS = {matmul.name: matmul for matmul in (Int4Matmul, Int8Matmul, ReferenceMatmul)}
MATMUL = "matmul."  # in front of the buffers of the multiplication
SALIENT = ("salient_columns", "salient_residual", "salient_scales")


class Matmul(Protocol):
    name: str

    def __call__(self, x: Tensor) -> Tensor: ...

    def dequantize(self, dtype: torch.dtype = ...) -> Tensor: ...


class QuantizedLinear(nn.Module):
    """x [T, K] -> [T, N] in the dtype of x."""

    bias: Tensor | None
    order: Tensor | None  # [K] columns of x as the kernel has them
    salient_columns: Tensor | None  # [S]
    salient_residual: Tensor  # [N, S] int8
    salient_scales: Tensor  # [S]

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernel: str = "auto",
        salient: Salient | None = None,
    ) -> None:
        """weight: on any device, repacked on `device`; the caller may drop it afterwards.

        dtype: of the bias; x may have any.
        kernel: a name of KERNELS. auto, torch: torch's own kernels for 4 and 8 bits where they
            take the weight, the reference where not; `kernel_name` tells which, and why. They
            compute in bfloat16 whatever x is, but for 8 bits on a GPU; the reference computes in
            the dtype of x, from exact weights.
        salient: adds x[:, columns] @ (residual * scales).T (spec: quantization 7).

        Raises ConfigError for a kernel that is not here.
        """
        super().__init__()
        self.form = Form.of(weight)
        device = torch.device(device)
        order, weight = _in_groups(weight)
        matmul, self.kernel_name = _build(weight, device, known_kernel(kernel))
        self.matmul = matmul
        self._keep("order", None if order is None else order.to(device))
        self._keep("bias", None if bias is None else bias.to(device, dtype))
        self._keep_salient(salient, device)

    @classmethod
    def restore(
        cls, form: Form, kernel_name: str, buffers: Mapping[str, Tensor]
    ) -> "QuantizedLinear":
        """The layer whose `named_buffers` these are, on their device; nothing is repacked."""
        linear = cls.__new__(cls)
        nn.Module.__init__(linear)
        linear.form, linear.kernel_name = form, kernel_name
        inner = {n.removeprefix(MATMUL): b for n, b in buffers.items() if n.startswith(MATMUL)}
        linear.matmul = MATMULS[kernel_name.partition(":")[0]].restore(form, inner)
        for name in ("order", "bias", *SALIENT):
            linear._keep(name, buffers.get(name))
        return linear

    @property
    def in_features(self) -> int:
        return self.form.columns

    @property
    def out_features(self) -> int:
        return self.form.rows

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.matmul(x if self.order is None else x[:, self.order])
        if self.salient_columns is not None:
            some = x[:, self.salient_columns] * self.salient_scales.to(x.dtype)
            y = y + F.linear(some, self.salient_residual.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], the weight that is multiplied with, salient columns included."""
        weight = self.matmul.dequantize(dtype)
        if self.order is not None:
            weight = weight[:, self.order.argsort()]
        if self.salient_columns is not None:
            added = self.salient_residual.to(dtype) * self.salient_scales.to(dtype)
            weight = weight.index_add(1, self.salient_columns, added)
        return weight

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, kernel={self.kernel_name!r}"

    def _keep(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)

    def _keep_salient(self, salient: Salient | None, device: torch.device) -> None:
        if salient is None:
            for name in SALIENT:
                self._keep(name, None)
            return
        columns, residual, scales = salient
        if residual.shape != (self.out_features, len(columns)) or scales.shape != columns.shape:
            raise CheckpointError(
                f"salient residuals {list(residual.shape)} with {len(scales)} scales do not fit "
                f"{self.out_features} outputs and {len(columns)} columns"
            )
        self._keep("salient_columns", columns.to(device, torch.int64))
        self._keep("salient_residual", residual.to(device))
        self._keep("salient_scales", scales.to(device))


def known_kernel(name: str) -> str:
    """torch or reference. Raises ConfigError for every name that means neither."""
    plain = {_plain(known): known for known in (*KERNELS, *FOREIGN)}
    name = plain.get(_plain(name), name)
    if name in KERNELS:
        return KERNELS[name]
    here = f"kernels here: {', '.join(KERNELS)}"
    if name not in FOREIGN:
        raise ConfigError(f"unknown kernel {name!r}; {here}")
    package = FOREIGN[name]
    state = "installed" if find_spec(package) else "not installed"
    raise ConfigError(
        f"kernel {name!r} is one of the package {package} ({state}), which this server does not "
        f"use; {here}"
    )


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _build(weight: QuantizedWeight, device: torch.device, kind: str) -> tuple[Matmul, str]:
    """The multiplication and its name."""
    if kind == "reference":
        return ReferenceMatmul(weight, device), ReferenceMatmul.name
    obstacle = _obstacle(weight, device)
    if obstacle is not None:
        return ReferenceMatmul(weight, device), f"{ReferenceMatmul.name}: {obstacle}"
    chosen = Int4Matmul if weight.bits == 4 else Int8Matmul
    return chosen(weight, device), chosen.name


def _obstacle(weight: QuantizedWeight, device: torch.device) -> str | None:
    if weight.bits == 4:
        return int4_matmul.obstacle(weight, device)
    if weight.bits == 8:
        return int8_matmul.obstacle(weight)
    return f"torch has no kernel for {weight.bits} bits"


def _in_groups(weight: QuantizedWeight) -> tuple[Tensor | None, QuantizedWeight]:
    """(order of columns, weight in it): columns of a group become neighbours.

    Kernels know no other groups. Without act-order, or where groups differ in size, nothing is
    changed and the order is None.
    """
    if weight.group_of is None:
        return None, weight
    columns, groups = weight.codes.shape[1], weight.scales.shape[1]
    sizes = weight.group_of.bincount(minlength=groups)
    if not (sizes * groups == columns).all():
        return None, weight
    order = weight.group_of.argsort(stable=True)
    ordered = QuantizedWeight(
        codes=weight.codes[:, order.to(weight.codes.device)],
        zeros=weight.zeros,
        scales=weight.scales,
        bits=weight.bits,
    )
    return order, ordered
