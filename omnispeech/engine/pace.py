"""How large the next block of sound is (spec: decoder 8).

The first block is small, so that sound starts early. After that a block grows, in steps of the
flow encoder's own block, as long as the listener's unheard sound lasts until one more step would
be written and decoded: fewer seams and less repeated work at no cost in waiting.
Speeds are measured as the machine runs, with all its conversations.
"""

from dataclasses import dataclass, field

SAFETY_S = 0.3  # sound the listener should still have when a block arrives
NEARLY = 1.25
PATIENCE_S = 0.5  # a block that takes longer would keep the other conversations waiting


@dataclass(slots=True)
class LinearCost:
    """Seconds as a line over the size of the work, fitted to what was measured lately."""

    memory: float = 0.95  # weight of everything measured before, per measurement
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # 1, x, y, xx, xy

    def clear(self) -> None:
        self._sums = [0.0] * 5

    def add(self, size: float, seconds: float) -> None:
        new = (1.0, size, seconds, size * size, size * seconds)
        self._sums = [self.memory * old + x for old, x in zip(self._sums, new, strict=True)]

    def predict(self, size: float) -> float:
        """0 before the first measurement; proportional while only one size was seen."""
        n, x, y, xx, xy = self._sums
        if not x:
            return 0.0
        spread = n * xx - x * x
        if spread <= 1e-6 * n * xx:
            return y * size / x
        slope = max(0.0, (n * xy - x * y) / spread)
        return max(0.0, (y - slope * x) / n + slope * size)


@dataclass(slots=True)
class Average:
    """Exponential moving average; 0 before the first value."""

    weight: float = 0.1
    value: float = 0.0

    def add(self, value: float) -> None:
        self.value = value if not self.value else self.value + self.weight * (value - self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast the machine is lately, for one reply among the others."""

    unit_s: float  # seconds in which every reply gets one more unit written
    talkers: int  # conversations that share the machine, this one included
    context: int  # units the next block is conditioned on
    cost: LinearCost  # of decoding, over the units in the window

    def decode_s(self, units: int) -> float:
        return self.cost.predict(self.context + units)

    def write_s(self, units: int, block: int) -> float:
        """Until `units` more are written, while the others have blocks of that size decoded."""
        others_s = (self.talkers - 1) * self.decode_s(block) / block
        return units * (self.unit_s + others_s)

    def cycle_s(self, block: int) -> float:
        """From one block of that size to the next."""
        return self.write_s(block, block) + self.decode_s(block)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRule:
    step: int  # units; blocks are multiples of it
    first: int  # units of the first block; 0: chosen from the pace
    most: int
    unit_audio_s: float  # seconds of sound per unit
    held_back_s: float  # sound the first block keeps for blending with the next

    def size(self, pending: int, ahead_s: float | None, pace: Pace) -> int:
        """Units to decode now, 0: wait for more.

        pending: units written but not decoded; ahead_s: unheard seconds the listener has, None
        before the first block.
        """
        if ahead_s is None:
            first = self.first or self._first(pace)
            return first if pending >= first else 0
        largest = self.largest(pace)
        whole = min(pending // self.step * self.step, largest)
        if whole == largest:
            return whole
        if whole < self._least(pace):
            return 0
        wait_s = pace.write_s(whole + self.step - pending, whole) + pace.decode_s(whole + self.step)
        return whole if ahead_s - SAFETY_S < wait_s else 0

    def scheduled(self, blocks: int) -> int:
        """Size of the block after so many: doubling, whatever the clock says, so that a reply
        that is asked for with a seed sounds the same every time."""
        return min((self.first or self.step) << min(blocks, 20), self.most)

    def largest(self, pace: Pace) -> int:
        """The most that may be decoded at once without keeping others waiting."""
        if pace.talkers == 1:
            return self.most
        sizes = range(self.most, self.step, -self.step)
        quick = next((n for n in sizes if pace.decode_s(n) <= PATIENCE_S), self.step)
        return max(quick, self._least(pace))

    def _first(self, pace: Pace) -> int:
        """One step if the next block can be there before the first one was heard, else two."""
        heard_s = self.step * self.unit_audio_s - self.held_back_s
        next_s = pace.write_s(self.step, self.step) + pace.decode_s(2 * self.step)
        return self.step if next_s <= heard_s else 2 * self.step

    def _least(self, pace: Pace) -> int:
        """The smallest block at which sound is made as fast as it is heard. Every block costs its
        context again, so a machine that falls behind with small ones would fall ever further.
        One that is too slow at any size takes nearly the cheapest."""
        enough_s = self.unit_audio_s
        cheapest_s = pace.cycle_s(self.most) / self.most
        bearable_s = max(enough_s, NEARLY * cheapest_s)
        sizes = range(self.step, self.most, self.step)
        return next((n for n in sizes if pace.cycle_s(n) <= n * bearable_s), self.most)
