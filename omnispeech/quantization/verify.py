"""A written directory read back, as a server reads it, and compared with what was quantized."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from omnispeech.checkpoint.files import build_on_meta
from omnispeech.checkpoint.shards import Shards
from omnispeech.errors import CheckpointError
from omnispeech.layers.packing import Scheme, packed_dtypes
from omnispeech.models.qwen3 import Block, Qwen3Config
from omnispeech.quantization.selection import layer_linears, layer_prefix
from omnispeech.quantization.stored import install, read_weight, tensor_digest, weight_digest
from omnispeech.quantization.stream import Stream

CPU = torch.device("cpu")
# The states that are compared went through the layers beside other sequences, and a matrix product
# of other shape rounds otherwise: in the last bits of float32, or across a border of bfloat16,
# which states in bfloat16 carry on from layer to layer.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # of the norm of the difference


class StoredModel:
    """The quantized tensors of a directory, one layer at a time."""

    def __init__(self, directory: Path, scheme: Scheme, kept: Collection[str]) -> None:
        self._shards = Shards(directory, CPU)
        self._scheme = scheme
        self._kept = kept

    def digests(self) -> Iterator[tuple[str, str]]:
        """(module or tensor, digest) of everything the directory holds."""
        packed = self._packed_modules()
        for module in sorted(packed):
            yield module, weight_digest(read_weight(self._read, module, self._scheme))
        inside = {f"{m}.{suffix}" for m in packed for suffix in packed_dtypes(self._scheme)}
        for name in sorted(set(self._shards.names) - inside):
            yield name, tensor_digest(self._read(name))

    def block(self, index: int, config: Qwen3Config, device: torch.device) -> Block:
        """float32, computing what the stored tensors mean."""
        prefix = layer_prefix(index)
        modules = [name for name in layer_linears(index) if name not in self._kept]
        packed = {f"{m}.{suffix}" for m in modules for suffix in packed_dtypes(self._scheme)}
        own = [n for n in self._shards.names if n.startswith(prefix) and n not in packed]
        block = build_on_meta(lambda: Block(config)).to_empty(device=device)
        assert isinstance(block, Block), type(block)
        install(
            block,
            {m.removeprefix(prefix): read_weight(self._read, m, self._scheme) for m in modules},
            {name.removeprefix(prefix): self._read(name) for name in own},
        )
        return block

    def _packed_modules(self) -> set[str]:
        ending = ".qweight"
        return {n.removesuffix(ending) for n in self._shards.names if n.endswith(ending)}

    def _read(self, name: str) -> Tensor:
        return self._shards.read(name, CPU, torch.float16)


def check_digests(stored: StoredModel, recorded: Mapping[str, str], directory: Path) -> None:
    """Raises CheckpointError unless every tensor, and no other, means what was recorded."""
    found = dict(stored.digests())
    wrong = [name for name in found.keys() & recorded.keys() if found[name] != recorded[name]]
    for kind, names in (
        ("missing", recorded.keys() - found.keys()),
        ("unexpected", found.keys() - recorded.keys()),
        ("not what was quantized", wrong),
    ):
        if names:
            raise CheckpointError(
                f"{directory} is damaged: {len(names)} tensors are {kind}, the first is "
                f"{min(names)}; quantize again with --overwrite, or --restart if it is not finished"
            )


def check_states(
    stored: StoredModel, layers: int, stream: Stream, expected: Tensor, directory: Path
) -> float:
    """Runs the sequence of `stream` through the stored layers.

    expected: [T, D] where the quantized stream ended with it. Returns the relative difference;
    raises CheckpointError if it is more than TOLERANCE of the type of the states.
    """
    for index in range(layers):
        stream.advance(stored.block(index, stream.config, stream.device))
    found = stream.states[0].float()
    wanted = expected.float()
    error = (torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted)).item()
    if not error <= TOLERANCE[expected.dtype]:
        raise CheckpointError(
            f"{directory} does not compute what was quantized: the first calibration sequence ends "
            f"{error:.2g} away (relative), allowed is {TOLERANCE[expected.dtype]:g}; "
            "quantize again with --restart"
        )
    return error
