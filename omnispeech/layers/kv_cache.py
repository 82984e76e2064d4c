"""Keys and values of every conversation in one block of memory per language model.

A conversation (`Row`) owns a run of neighbouring positions as long as it can ever need, so that
its keys are one view without a copy, nothing moves while it talks, and it never runs out in the
middle of a reply. A model call takes tokens of any rows at any lengths, laid end to end (`Layout`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class Row:
    start: int
    capacity: int
    length: int = 0  # positions filled


@dataclass(frozen=True, slots=True)
class Span:
    """Which tokens of a call belong to one row, and where its keys lie."""

    tokens: slice  # in the call
    keys: slice  # in the cache, the tokens of this call included
    mask: Tensor | None  # [T, L], which keys each token sees; None: what causality alone says


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """One call: tokens of several rows laid end to end."""

    positions: Tensor  # [T] in each token's own conversation
    slots: Tensor  # [T] in the cache
    spans: tuple[Span, ...]
    parts: tuple[tuple[Row, int], ...]

    def commit(self) -> None:
        """The call succeeded: its tokens are now part of their rows."""
        for row, count in self.parts:
            row.length += count

    @property
    def last(self) -> list[int]:
        """Index of the last token of each row in the call."""
        return [span.tokens.stop - 1 for span in self.spans]


class KVCache:
    def __init__(
        self,
        layers: int,
        tokens: int,
        heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, tokens, heads, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)  # [layers, T, H, D]
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.tokens = tokens
        self._holes = [(0, tokens)]  # (start, length), sorted by start, never adjacent

    @property
    def free_tokens(self) -> int:
        return sum(length for _, length in self._holes)

    @property
    def used_tokens(self) -> int:
        return self.tokens - self.free_tokens

    def allocate(self, capacity: int) -> Row | None:
        """The first hole that is long enough; None if there is none."""
        for i, (start, length) in enumerate(self._holes):
            if length >= capacity:
                rest = [(start + capacity, length - capacity)] if length > capacity else []
                self._holes[i : i + 1] = rest
                return Row(start, capacity)
        return None

    def could_allocate(self, capacity: int, without: Sequence[Row]) -> bool:
        """Whether there would be room if the rows `without` were given back."""
        runs = sorted([*self._holes, *((row.start, row.capacity) for row in without)])
        return any(length >= capacity for _, length in _joined(runs))

    def release(self, row: Row) -> None:
        """Gives the positions back; the row must not be used again."""
        self._free(row.start, row.capacity)

    def trim(self, row: Row) -> None:
        """Gives back the positions that are not filled."""
        self._free(row.start + row.length, row.capacity - row.length)
        row.capacity = row.length

    def copy(self, source: Row, target: Row, count: int) -> None:
        """The first `count` positions of one row become those of another, which was empty."""
        here = slice(source.start, source.start + count)
        there = slice(target.start, target.start + count)
        self.keys[:, there] = self.keys[:, here]
        self.values[:, there] = self.values[:, here]
        target.length = count

    def _free(self, start: int, length: int) -> None:
        if length:
            self._holes = _joined(sorted([*self._holes, (start, length)]))

    def layout(self, parts: Sequence[tuple[Row, int]]) -> Layout:
        """parts: (row, number of new tokens), in the order of the tokens in the call."""
        device = self.keys.device
        positions: list[int] = []
        slots: list[int] = []
        spans = []
        for row, count in parts:
            end = row.length + count
            assert end <= row.capacity, (end, row.capacity)
            tokens = slice(len(positions), len(positions) + count)
            keys = slice(row.start, row.start + end)
            spans.append(Span(tokens, keys, _causal_mask(count, end, device)))
            positions += range(row.length, end)
            slots += range(row.start + row.length, row.start + end)
        return Layout(
            torch.tensor(positions, device=device),
            torch.tensor(slots, device=device),
            tuple(spans),
            tuple(parts),
        )

    def write(self, layer: int, layout: Layout, keys: Tensor, values: Tensor) -> None:
        """keys, values: [T, H, D], in place."""
        self.keys[layer].index_copy_(0, layout.slots, keys)
        self.values[layer].index_copy_(0, layout.slots, values)


def _joined(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, length) in order -> the same positions, neighbours made one."""
    joined: list[tuple[int, int]] = []
    for start, length in runs:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return joined


def _causal_mask(new: int, total: int, device: torch.device) -> Tensor | None:
    """[T, L] for tokens behind others of their row: one alone, or a whole row, needs none."""
    if not 1 < new < total:
        return None
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
