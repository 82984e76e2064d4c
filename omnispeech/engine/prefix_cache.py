"""What finished conversations have read, kept while memory allows.

The next turn of a conversation repeats everything before it. Its prompt is compared, position by
position, with those kept; the longest common beginning is neither heard nor read again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from omnispeech.layers.kv_cache import KVCache, Row

# a token id, or (digest of an audio, place in it)
Position = int | tuple[bytes, int]


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    key: Sequence[Position]
    row: Row


class PrefixCache:
    def __init__(self, cache: KVCache, *, enabled: bool = True) -> None:
        self._cache = cache
        self._enabled = enabled
        self._kept: list[Kept] = []  # oldest first

    @property
    def kept_tokens(self) -> int:
        return sum(kept.row.capacity for kept in self._kept)

    def take(self, key: Sequence[Position], capacity: int) -> Row | None:
        """A row with as much of `key` already in it as is known; None if there is no room.

        The last position is never reused: reading it is what gives the first token.
        """
        best, common = self._longest(key[:-1])
        row = self._allocate(capacity)
        if row is not None and best is not None and best in self._kept:
            self._cache.copy(best.row, row, common)
        return row

    def keep(self, key: Sequence[Position], row: Row) -> None:
        """`key`: what the row has read; the room it did not use is given back."""
        if not self._enabled or not row.length:
            self._cache.release(row)
            return
        self._cache.trim(row)
        self._kept.append(Kept(key[: row.length], row))

    def _allocate(self, capacity: int) -> Row | None:
        row = self._cache.allocate(capacity)
        while row is None and self._kept:
            self._cache.release(self._kept.pop(0).row)
            row = self._cache.allocate(capacity)
        return row

    def _longest(self, key: Sequence[Position]) -> tuple[Kept | None, int]:
        best, most = None, 0
        for kept in self._kept:
            common = _common(key, kept.key)
            if common > most:
                best, most = kept, common
        return best, most


def _common(a: Sequence[Position], b: Sequence[Position]) -> int:
    """Length of the common beginning, by bisection: comparing slices is fast, single items not."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
