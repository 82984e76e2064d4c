"""How far a bridge is from the checkpoint's own encoder, on files it has not heard."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omnispeech.bridge_training.listeners import Heard, Listeners

PLACES = ("encoder", "adapter")  # behind which it is measured
Rival = Callable[[Heard], Tensor]  # -> [T, d_model] in place of the encoder's frames


@dataclass(slots=True, eq=False)
class Spread:
    """Of vectors: what the best constant would leave of them."""

    count: int = 0
    squares: float = 0.0
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, vectors: Tensor) -> None:
        """[T, D]"""
        self.count += len(vectors)
        self.squares += float(vectors.square().sum())
        self.total = self.total + vectors.sum(0)

    @property
    def variance(self) -> float:
        """Of one vector around the mean of all, summed over its numbers."""
        return self.squares / self.count - float((self.total / self.count).square().sum())


@dataclass(slots=True, eq=False)
class Misses:
    """Squared distances of one rival behind one place, by file."""

    of: dict[str, tuple[int, float]] = field(default_factory=dict)  # name: vectors, sum

    def add(self, name: str, given: Tensor, wanted: Tensor) -> None:
        count, total = self.of.get(name, (0, 0.0))
        self.of[name] = count + len(wanted), total + float((given - wanted).square().sum())

    def relative(self, variance: float) -> float:
        counts, totals = zip(*self.of.values(), strict=True)
        return sum(totals) / sum(counts) / variance

    def by_file(self, variance: float) -> dict[str, float]:
        """From the best to the worst."""
        found = {name: total / count / variance for name, (count, total) in self.of.items()}
        return dict(sorted(found.items(), key=lambda item: item[1]))


class HeldOut:
    """Relative errors: 0 is the encoder itself, 1 what no constant can be better than."""

    def __init__(self, rivals: Mapping[str, Rival]) -> None:
        self._rivals = rivals
        self._spreads = {place: Spread() for place in PLACES}
        self._misses = {(rival, place): Misses() for rival in rivals for place in PLACES}

    @torch.inference_mode()
    def add(self, name: str, heard: Heard, listeners: Listeners) -> None:
        """One clip of the file `name`."""
        wanted = self._places(heard.frames, listeners)
        for place, vectors in wanted.items():
            self._spreads[place].add(vectors)
        for rival, give in self._rivals.items():
            given = self._places(give(heard), listeners)
            for place in PLACES:
                self._misses[rival, place].add(name, given[place], wanted[place])

    def _places(self, frames: Tensor, listeners: Listeners) -> dict[str, Tensor]:
        behind = (frames, listeners.adapt(frames))
        return {p: t.to("cpu", torch.float64) for p, t in zip(PLACES, behind, strict=True)}

    def errors(self) -> dict[str, dict[str, float]]:
        """{"encoder": {rival: relative error}, "adapter": ...}"""
        return {
            place: {
                rival: self._misses[rival, place].relative(self._spreads[place].variance)
                for rival in self._rivals
            }
            for place in PLACES
        }

    def by_file(self, rival: str) -> dict[str, float]:
        """Behind the encoder, from the best file to the worst."""
        return self._misses[rival, PLACES[0]].by_file(self._spreads[PLACES[0]].variance)
