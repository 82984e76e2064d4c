"""The two residual branches of a decoder layer, and how channel scales travel through them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omnispeech.layers.norms import RMSNorm
from omnispeech.models.qwen3 import Block
from omnispeech.quantization.methods.grid import few_rows
from omnispeech.quantization.stream import Batch, Stream

SHARE = 512  # that go through an MLP at a time, its inner vectors are wide
NARROW = (torch.bfloat16, torch.float16)


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
        return batch.attend(block, block.input_layernorm(batch.x)).add_(batch.x)

    def run(self, block: Block, batch: Batch, state: Tensor) -> Tensor:
        """[T, D] -> [T, D], what the branch adds to the state."""
        normed = self.norm_of(block)(state)
        return batch.attend(block, normed) if self.module == "self_attn" else block.mlp(normed)

    def shares(self, batch: Batch) -> Iterator[tuple[slice, list[int]]]:
        """Tokens that can be run without the others, and the lengths of the sequences in them.

        An MLP takes each token by itself; sequences that are long are cut.
        """
        if self.module == "self_attn":
            yield slice(None), batch.lengths
            return
        start, share = 0, list[int]()
        for length in _cut(batch.lengths):
            if share and sum(share) + length > SHARE:
                yield slice(start, start + sum(share)), share
                start, share = start + sum(share), []
            share.append(length)
        yield slice(start, None), share

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


def _cut(lengths: Iterable[int]) -> Iterator[int]:
    for length in lengths:
        for start in range(0, length, SHARE):
            yield min(SHARE, length - start)


def linear(block: Block, name: str) -> nn.Linear:
    found = block.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


class Originals:
    """Parameters of a branch as they are now, in the smallest dtype that holds them exactly."""

    def __init__(self, block: Block, branch: Branch) -> None:
        self._parameters = dict(branch.parameters(block))
        self._kept = {name: _narrowed(p.detach()) for name, p in self._parameters.items()}

    def weight(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A copy of some rows [N, K] of a linear's weight, float32."""
        return self._kept[f"{name}.weight"][rows].to(torch.float32, copy=True)

    def restore(self, names: Iterable[str] | None = None) -> None:
        """Brings back the weights of some linears, or every parameter."""
        chosen = self._kept if names is None else [f"{name}.weight" for name in names]
        for name in chosen:
            self._parameters[name].copy_(self._kept[name])


def _narrowed(tensor: Tensor) -> Tensor:
    """A copy. Weights that were read from 16 bits fit into them."""
    for dtype in NARROW:
        if all(torch.equal(rows.to(dtype).float(), rows) for rows in few_rows(tensor)):
            return tensor.to(dtype)
    return tensor.clone()


class Trial:
    """The true output of a branch on some tokens: what candidates are judged by in the end."""

    def __init__(self, block: Block, branch: Branch, stream: Stream, tokens: int) -> None:
        """Remembers the branch as it is now, and what it puts out."""
        self._block, self._branch, self._stream = block, branch, stream
        self._tokens = tokens
        self.floats = Originals(block, branch)
        # attention needs all of a sequence: it reads the stream again
        self._states = list(self._counted_states()) if branch.module == "mlp" else []
        self._wanted = list(self._outputs())
        self._energy = sum(float(output.square().sum()) for output in self._wanted)

    def loss(self) -> float:
        """Squared error of the branch as it is now, over the energy of the remembered output."""
        error = 0.0
        for now, wanted in zip(self._outputs(), self._wanted, strict=True):
            error += float(now.sub_(wanted).square_().sum())
        return error / max(self._energy, 1e-30)

    def loss_with(self, names: Iterable[str], changed: Callable[[Tensor], Tensor]) -> float:
        """The same with other weights of some linears, which must be as they were remembered.

        changed: some rows [N, K] of one of them -> what stands in their place meanwhile.
        """
        names = list(names)
        for name in names:
            for rows in few_rows(linear(self._block, name).weight):
                rows.copy_(changed(rows))
        loss = self.loss()
        self.floats.restore(names)
        return loss

    def _outputs(self) -> Iterator[Tensor]:
        """[T, D] at a time, of the counted tokens"""
        if self._branch.module == "mlp":
            for state in self._states:
                yield self._block.mlp(self._branch.norm_of(self._block)(state))
            return
        for batch in self._batches():
            yield self._branch.run(self._block, batch, batch.x)[batch.counted]

    def _counted_states(self) -> Iterator[Tensor]:
        """[T, D] at a time, in front of the norm"""
        for batch in self._batches():
            yield from torch.split(self._branch.enter(self._block, batch)[batch.counted], SHARE)

    def _batches(self) -> Iterator[Batch]:
        """So many that there are tokens enough."""
        tokens = self._tokens
        for batch in self._stream.batches():
            yield batch
            tokens -= int(batch.counted.sum())
            if tokens <= 0:
                return
