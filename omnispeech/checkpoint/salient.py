"""The sidecar of a quantized model: some columns of its linears once more, in eight bits
(spec: quantization 7, salient quota)."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from omnispeech.checkpoint.files import listed, misfits
from omnispeech.checkpoint.tensor_file import TensorFile
from omnispeech.errors import CheckpointError

FILE = Path("salient") / "salient.safetensors"  # under the directory of the model
DTYPES = {"indices": torch.int32, "residual": torch.int8, "scales": torch.float16}


class Sidecar:
    """For a linear `m` with N outputs: m.indices [S], m.residual [N, S] and m.scales [S]."""

    def __init__(self, path: Path) -> None:
        self._file = TensorFile(path)

    def misfits(self, linears: Mapping[str, nn.Linear]) -> list[str]:
        """Complaints; linears: those that are quantized, by name."""
        found = {name: entry.shape for name, entry in self._file.entries.items()}
        wanted: dict[str, tuple[int, ...]] = {}
        for name in {entry.rpartition(".")[0] for entry in found} & linears.keys():
            columns = (found.get(f"{name}.indices") or (0,))[0]
            shapes = ((columns,), (linears[name].out_features, columns), (columns,))
            wanted |= {f"{name}.{s}": shape for s, shape in zip(DTYPES, shapes, strict=True)}
        mistyped = [
            f"{name} {self._file.entries[name].dtype}"
            for name in wanted.keys() & found.keys()
            if self._file.entries[name].dtype != DTYPES[name.rpartition(".")[2]]
        ]
        complaints = [*misfits(wanted, found), *listed("of another type", mistyped)]
        return [f"{FILE}: {complaint}" for complaint in complaints]

    def read(self, name: str, linear: nn.Linear) -> tuple[Tensor, Tensor, Tensor] | None:
        """indices, residual and scales of one linear, on the CPU; None if it has none."""
        if f"{name}.indices" not in self._file.entries:
            return None
        indices, residual, scales = (self._file.read(f"{name}.{suffix}") for suffix in DTYPES)
        last = linear.in_features - 1
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) <= last:
            raise CheckpointError(f"{self._file.path} names columns of {name} outside 0 to {last}")
        return indices, residual, scales
