"""Tensors of a checkpoint -> a model built on meta, quantized linears where the files hold them."""

from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from omnispeech.checkpoint.files import listed, misfits
from omnispeech.checkpoint.kernel_ready import KernelReady
from omnispeech.checkpoint.salient import Sidecar
from omnispeech.checkpoint.shards import TensorFiles
from omnispeech.errors import CheckpointError
from omnispeech.layers.linear import QuantizedLinear
from omnispeech.layers.packing import Scheme, packed_dtypes, packed_shapes, unpack
from omnispeech.layers.quantized_weight import Form
from omnispeech.models.qwen3 import Block, CausalLM


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the packed weights of a checkpoint were made and are stored."""

    method: str  # awq, gptq or int8
    scheme: Scheme
    not_converted: tuple[str, ...] = ()  # told by the file; which tensors are packed decides


@dataclass(frozen=True, slots=True)
class Target:
    """Where weights go and what computes with them."""

    device: torch.device
    dtype: torch.dtype  # of weights that are not packed, and of what the linears read
    kernel: str = "auto"  # of quantized linears
    threads: int = 0  # that read; 0: see `read_tensors`


class WeightPlan:
    """Which tensor of the files goes where in `model`; nothing is read before `load`."""

    def __init__(
        self,
        model: nn.Module,
        tensors: TensorFiles,
        quantization: Quantization | None,
        source: str,
        *,
        elsewhere: tuple[str, ...] = (),
        sidecar: Sidecar | None = None,
    ) -> None:
        """Raises CheckpointError, with every tensor that does not fit.

        model: on meta. A linear of its decoder layers is quantized where the files hold its
            `qweight`: they decide, name by name.
        source: file or directory for messages.
        elsewhere: beginnings of names that other files fill; here they are never read.
        sidecar: columns of quantized linears in eight bits, added to them.
        """
        self.model = model
        self.quantization = quantization
        self.source = source
        self._tensors = tensors
        self._sidecar = sidecar
        self._elsewhere = elsewhere
        self._names = [n for n in tensors.names if not n.startswith(elsewhere)]
        self.tied = _tied_heads(model, self._names)
        self._check()

    @cached_property
    def quantized(self) -> dict[str, nn.Linear]:
        """The linears of the model whose packed weights are in the files, by name."""
        names = set(self._names)
        return {
            f"{path}.{name}": linear
            for path, block in self.model.named_modules()
            if isinstance(block, Block)
            for name, linear in block.named_modules()
            if isinstance(linear, nn.Linear) and f"{path}.{name}.qweight" in names
        }

    @property
    def names(self) -> list[str]:
        """Of all tensors that are to be read, in the order of the files."""
        return list(self._names)

    @property
    def bytes_read(self) -> int:
        return self._tensors.bytes_read

    @property
    def forms(self) -> dict[str, Form]:
        """Of the linears whose packed weights are in the files, by name."""
        return {
            name: Form(linear.out_features, linear.in_features, self._scheme.bits)
            for name, linear in self.quantized.items()
        }

    def load(
        self,
        target: Target,
        names: Collection[str] | None = None,
        ready: KernelReady | None = None,
    ) -> None:
        """Fills the model, reading in the order of the files.

        A quantized linear is built as soon as all its tensors are there, and they are let go.
        names: of the tensors to load now, whole language models; None: all.
        ready: holds the quantized linears as they shall be; of theirs only biases are read here.
        """
        wanted = self._names if names is None else [n for n in self._names if n in names]
        linears = {n.rpartition(".")[0] for n in wanted} & self.quantized.keys()
        if ready:
            wanted = [n for n in wanted if n.rpartition(".")[0] not in linears or _is_bias(n)]
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in linears}
        plain: dict[str, Tensor] = {}
        for name, tensor in self._read(wanted, target):
            module, _, suffix = name.rpartition(".")
            if module not in parts:
                plain[name] = tensor
                continue
            parts[module][suffix] = tensor
            if not ready and parts[module].keys() == self._suffixes(module):
                self._place(module, parts.pop(module), target)
        if ready:
            self._place_ready(ready, parts, target)
        plain |= {
            head: plain[embedding] for head, embedding in self.tied.items() if embedding in plain
        }
        self.model.load_state_dict(plain, assign=True, strict=False)

    def _read(self, names: list[str], target: Target) -> Iterator[tuple[str, Tensor]]:
        packed = {f"{module}.{s}" for module in self.quantized for s in packed_dtypes(self._scheme)}
        wanted = [(n, torch.float16 if n in packed else target.dtype) for n in names]
        with closing(self._tensors.read_all(wanted, target.device, target.threads)) as tensors:
            for name in names:
                yield name, next(tensors)

    def _place_ready(
        self, ready: KernelReady, parts: dict[str, dict[str, Tensor]], target: Target
    ) -> None:
        biases = {name: part["bias"] for name, part in parts.items() if part}
        linears = ready.read(parts.keys(), biases, target.device, target.threads)
        with closing(linears):
            for name, linear in linears:
                self.model.set_submodule(name, linear)

    def _place(self, name: str, parts: dict[str, Tensor], target: Target) -> None:
        linear = QuantizedLinear(
            unpack(parts, self._scheme),
            parts.get("bias"),
            dtype=target.dtype,
            device=target.device,
            kernel=target.kernel,
            salient=self._sidecar.read(name, self.quantized[name]) if self._sidecar else None,
        )
        self.model.set_submodule(name, linear)

    def _suffixes(self, name: str) -> set[str]:
        bias = self.quantized[name].bias is not None
        return {*packed_dtypes(self._scheme), *(["bias"] if bias else [])}

    def _check(self) -> None:
        found = {name: self._tensors.shape(name) for name in self._names}
        heads = {head: found[embedding] for head, embedding in self.tied.items()}
        complaints = [
            *misfits(self._wanted_shapes(), found | heads),
            *listed("of another type", self._mistyped()),
            *(self._sidecar.misfits(self.quantized) if self._sidecar else ()),
        ]
        if complaints:
            raise CheckpointError(f"{self.source} does not fit the model: {'; '.join(complaints)}")

    def _wanted_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors of the model, packed ones in place of the weights that are quantized."""
        wanted = {
            name: tuple(tensor.shape)
            for name, tensor in self.model.state_dict().items()
            if not name.startswith(self._elsewhere)
        }
        for name, linear in self.quantized.items():
            del wanted[f"{name}.weight"]
            try:
                shapes = packed_shapes(self._scheme, linear.out_features, linear.in_features)
            except CheckpointError as exc:
                raise CheckpointError(f"{name} of {self.source}: {exc}") from exc
            wanted |= {f"{name}.{suffix}": shape for suffix, shape in shapes.items()}
        return wanted

    def _mistyped(self) -> list[str]:
        """Packed tensors have one type each, all others any floating point."""
        packed = {
            f"{name}.{suffix}": dtype
            for name in self.quantized
            for suffix, dtype in packed_dtypes(self._scheme).items()
        }
        found = {name: self._tensors.dtype(name) for name in self._names}
        return [
            f"{name} {dtype} instead of {packed.get(name, 'floating point')}"
            for name, dtype in found.items()
            if (dtype != packed[name] if name in packed else not dtype.is_floating_point)
        ]

    @property
    def _scheme(self) -> Scheme:
        if self.quantization is None:
            raise CheckpointError(
                f"{self.source} holds {min(self.quantized)}.qweight, but its config.json has no "
                "quantization_config that says how it is packed"
            )
        return self.quantization.scheme


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def _tied_heads(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Heads to take from the embedding: {head: embedding}.

    Only where no head is stored. The original uses a stored head whatever the flag says.
    """
    prefixes = [
        f"{path}." if path else ""
        for path, lm in model.named_modules()
        if isinstance(lm, CausalLM) and lm.config.tie_word_embeddings
    ]
    pairs = {f"{p}lm_head.weight": f"{p}model.embed_tokens.weight" for p in prefixes}
    stored = set(names)
    return {head: e for head, e in pairs.items() if head not in stored and e in stored}
