"""Quantized linears as their kernels have them, in one file: loading them repacks nothing."""

import json
from collections.abc import Collection, Generator, Mapping
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from omnispeech.checkpoint.reader import Request, Tensors, read_tensors, transfers_to
from omnispeech.checkpoint.tensor_file import Layout, TensorFile, write_tensor_file
from omnispeech.errors import CheckpointError
from omnispeech.layers.linear import QuantizedLinear
from omnispeech.layers.quantized_weight import Form

LAYOUT = 1  # of these files, and of what the kernels keep
LINEARS = "linears"  # key of the metadata: {linear: [rows, columns, bits, kernel name]}
APART = ":"  # between the name of a linear and that of a buffer of it
BIAS = "bias"  # is never repacked, and read where it was


class KernelReady:
    def __init__(self, path: Path) -> None:
        """Reads the header; raises CheckpointError for a file that is damaged."""
        self.path = path
        self._file = TensorFile(path)
        self.header_digest = self._file.header_digest
        try:
            told = json.loads(self._file.metadata[LINEARS])
            self.forms = {name: Form(*sizes) for name, (*sizes, _) in told.items()}
            self._kernels = {name: str(kernel) for name, (*_, kernel) in told.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise CheckpointError(f"{path} does not tell what linears it holds: {exc!r}") from exc

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    def read(
        self,
        linears: Collection[str],
        biases: Mapping[str, Tensor],
        device: torch.device,
        threads: int,
    ) -> Generator[tuple[str, QuantizedLinear], None, None]:
        """Each of `linears` with its name, as soon as all of it is there."""
        names = [n for n in self._file.in_order() if n.partition(APART)[0] in linears]
        left = {linear: 0 for linear in linears}
        for name in names:
            left[name.partition(APART)[0]] += 1
        parts: dict[str, dict[str, Tensor]] = {linear: {} for linear in linears}
        with closing(self._read(names, device, threads)) as tensors:
            for name in names:
                linear, _, buffer = name.partition(APART)
                parts[linear][buffer] = next(tensors)
                if len(parts[linear]) == left[linear]:
                    buffers = parts.pop(linear) | (
                        {BIAS: biases[linear]} if linear in biases else {}
                    )
                    form, kernel = self.forms[linear], self._kernels[linear]
                    yield linear, QuantizedLinear.restore(form, kernel, buffers)

    def _read(self, names: list[str], device: torch.device, threads: int) -> Tensors:
        requests = [Request(self._file, n, self._file.entries[n].dtype) for n in names]
        return read_tensors(requests, device, threads, transfers_to(device))


def kernel_ready_layout(linears: Mapping[str, QuantizedLinear]) -> Layout:
    return {
        f"{name}{APART}{buffer}": (tensor.dtype, tuple(tensor.shape))
        for name, linear in linears.items()
        for buffer, tensor in linear.named_buffers()
        if buffer != BIAS
    }


def write_kernel_ready(path: Path, linears: Mapping[str, QuantizedLinear]) -> None:
    """One tensor after the other, from wherever they are."""
    told = {
        name: [linear.form.rows, linear.form.columns, linear.form.bits, linear.kernel_name]
        for name, linear in linears.items()
    }

    def read(name: str) -> Tensor:
        linear, _, buffer = name.partition(APART)
        return linears[linear].get_buffer(buffer)

    metadata = {LINEARS: json.dumps(told, sort_keys=True)}
    write_tensor_file(path, kernel_ready_layout(linears), read, metadata)
