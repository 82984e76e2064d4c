"""The two residual branches of a decoder layer, and how channel scales travel through them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omnispeech.layers.norms import RMSNorm
from omnispeech.models.qwen3 import Block
from omnispeech.quantization.stream import Batch, Stream


@dataclass(frozen=True, slots=True)
class Branch:
    """norm -> readers -> last. Rows of `before` may carry the inverse of last's column scales."""

    module: str
    norm: str
    readers: tuple[str, ...]
    before: str
    last: str

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.readers, self.last)

    def enter(self, block: Block, batch: Batch) -> Tensor:
        """[T, D] the state in front of the norm."""
        if self.module == "self_attn":
            return batch.x
        return batch.x + batch.attend(block, block.input_layernorm(batch.x))

    def run(self, block: Block, batch: Batch, state: Tensor) -> Tensor:
        """[T, D] -> [T, D], what the branch adds to the state."""
        normed = self.norm_of(block)(state)
        return batch.attend(block, normed) if self.module == "self_attn" else block.mlp(normed)

    def norm_of(self, block: Block) -> RMSNorm:
        norm = block.get_submodule(self.norm)
        assert isinstance(norm, RMSNorm)
        return norm

    def tie(self, block: Block) -> Tensor:
        """[K of last] -> the row of `before` behind each column: query heads share values."""
        rows = linear(block, self.before).out_features
        columns = torch.arange(linear(block, self.last).in_features)
        if self.module != "self_attn":
            return columns
        width = block.self_attn.head_dim
        shared = len(columns) // rows
        return columns // width // shared * width + columns % width

    def parameters(self, block: Block) -> Iterator[tuple[str, nn.Parameter]]:
        """By name relative to the layer."""
        for name in (self.norm, *self.linears):
            yield from block.get_submodule(name).named_parameters(name)


ATTENTION = Branch(
    "self_attn",
    "input_layernorm",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj",
    "self_attn.o_proj",
)
MLP = Branch(
    "mlp",
    "post_attention_layernorm",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj",
    "mlp.down_proj",
)
BRANCHES = (ATTENTION, MLP)


def linear(block: Block, name: str) -> nn.Linear:
    found = block.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


class Trial:
    """The true output of a branch on some tokens: what candidates are judged by in the end."""

    def __init__(self, block: Block, branch: Branch, stream: Stream, tokens: int) -> None:
        """Remembers the output of the branch as it is now."""
        self._block, self._branch = block, branch
        self._cases: list[tuple[Batch, Tensor, Tensor]] = []
        for batch in stream.batches():
            state = branch.enter(block, batch)
            output = branch.run(block, batch, state)[batch.counted]
            self._cases.append((batch, state, output))
            tokens -= len(output)
            if tokens <= 0:
                break
        self._energy = sum(float(output.square().sum()) for _, _, output in self._cases)

    def loss(self) -> float:
        """Squared error of the branch as it is now, over the energy of the remembered output."""
        error = 0.0
        for batch, state, output in self._cases:
            now = self._branch.run(self._block, batch, state)[batch.counted]
            error += float(now.sub_(output).square_().sum())
        return error / max(self._energy, 1e-30)

    def loss_with(self, weights: Mapping[str, Tensor]) -> float:
        """The same with other weights in the place of some linears'."""
        linears = {name: linear(self._block, name) for name in weights}
        kept = {name: module.weight.data for name, module in linears.items()}
        for name, module in linears.items():
            module.weight.data = weights[name]
        loss = self.loss()
        for name, module in linears.items():
            module.weight.data = kept[name]
        return loss
