"""Hidden states of the calibration sequences on their way through the model, layer by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnispeech.layers.kv_cache import KVCache, Layout
from omnispeech.models.qwen3 import Block, Qwen3Config


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some sequences laid end to end, on the device, in float32."""

    x: Tensor  # [T, D] what the layer reads
    counted: Tensor  # [T] bool: tokens that statistics and losses are taken over
    lengths: list[int]  # of the sequences, T together
    rotary: tuple[Tensor, Tensor]
    cache: KVCache  # of one layer
    layout: Layout

    def run(self, block: Block) -> Tensor:
        """[T, D] what the layer leaves behind."""
        return block(self.x, self.rotary, self.cache, 0, self.layout)

    def attend(self, block: Block, normed: Tensor) -> Tensor:
        """[T, D] output of the attention (o_proj included) for inputs after the norm [T, D]."""
        return block.self_attn(normed, self.rotary, self.cache, 0, self.layout)


class Stream:
    """States [T, D] of every sequence in front of one layer; they live on the host."""

    def __init__(
        self,
        config: Qwen3Config,
        states: Sequence[Tensor],
        counted: Sequence[Tensor],
        *,
        device: torch.device,
        batch_tokens: int,
    ) -> None:
        """batch_tokens: sequences share a call up to so many tokens, a longer one is alone."""
        self.config = config
        self.states = list(states)
        self.counted = list(counted)
        self.device = device
        self.batch_tokens = batch_tokens

    def batches(self) -> Iterator[Batch]:
        for indices in self._shares():
            yield self._batch(indices)

    def advance(self, block: Block) -> None:
        """Replaces every state by what `block` makes of it."""
        for indices in self._shares():
            out = self._batch(indices).run(block)
            parts = torch.split(out, [len(self.states[i]) for i in indices])
            for i, part in zip(indices, parts, strict=True):
                self.states[i] = part.to("cpu", self.states[i].dtype)

    def _shares(self) -> Iterator[list[int]]:
        """Neighbouring sequences that go through the layer together."""
        share: list[int] = []
        tokens = 0
        for i, state in enumerate(self.states):
            if share and tokens + len(state) > self.batch_tokens:
                yield share
                share, tokens = [], 0
            share.append(i)
            tokens += len(state)
        if share:
            yield share

    def _batch(self, indices: Sequence[int]) -> Batch:
        c = self.config
        lengths = [len(self.states[i]) for i in indices]
        cache = KVCache(
            1,
            sum(lengths),
            c.num_key_value_heads,
            c.head_dim,
            dtype=torch.float32,
            device=self.device,
        )
        rows = [cache.allocate(length) for length in lengths]
        layout = cache.layout([(r, n) for r, n in zip(rows, lengths, strict=True) if r])
        return Batch(
            x=torch.cat([self.states[i] for i in indices]).to(self.device, torch.float32),
            counted=torch.cat([self.counted[i] for i in indices]).to(self.device),
            lengths=lengths,
            rotary=c.rotary(layout.positions),
            cache=cache,
            layout=layout,
        )
