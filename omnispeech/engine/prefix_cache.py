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
        self._kept: list[Kept] = []  # least recently used first

    @property
    def kept_tokens(self) -> int:
        return sum(kept.row.capacity for kept in self._kept)

    def known(self, key: Sequence[Position]) -> int:
        """How much of `key` `take` would find now. Safe from any thread."""
        return self._longest(key[:-1])[1]

    def take(self, key: Sequence[Position], capacity: int) -> Row | None:
        """A row with as much of `key` already in it as is known; None if there is no room.

        The last position is never reused: reading it is what gives the first token.
        """
        best, common = self._longest(key[:-1])
        if best is not None:  # just used: the last to make room
            self._kept.remove(best)
            self._kept.append(best)
        row = self._allocate(capacity)
        if row is not None and best is not None and best in self._kept:
            self._cache.copy(best.row, row, common)
        return row

    def keep(self, key: Sequence[Position], row: Row) -> None:
        """`key`: what the row has read; the room it did not use is given back.

        Of two rows of which one begins like the whole other, the longer is kept.
        """
        key = key[: row.length]
        longest, common = self._longest(key)
        if not self._enabled or not key or (longest is not None and common == len(key)):
            self._cache.release(row)
            return
        self._cache.trim(row)
        for kept in [k for k in self._kept if _common(key, k.key) == len(k.key)]:
            self._drop(kept)
        self._kept.append(Kept(key, row))

    def _allocate(self, capacity: int) -> Row | None:
        row = self._cache.allocate(capacity)
        if row is None and self._cache.could_allocate(capacity, [k.row for k in self._kept]):
            while row is None:
                self._drop(self._kept[0])
                row = self._cache.allocate(capacity)
        return row

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self._cache.release(kept.row)

    def _longest(self, key: Sequence[Position]) -> tuple[Kept | None, int]:
        best, most = None, 0
        for kept in tuple(self._kept):
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
