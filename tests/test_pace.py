"""Sizes of blocks by the speed of the machine (spec: decoder 8)."""

import pytest

from omnispeech.engine.pace import BlockRule, LinearCost, Pace
from omnispeech.engine.playback import Playback

UNIT_S = 0.08
HELD_BACK_S = 34 * 256 / 22050


def pace(
    unit_s: float = 0.02, slope_s: float = 0.0, fixed_s: float = 0.0, *, talkers: int = 1
) -> Pace:
    """Decoding costs `fixed_s` and `slope_s` per unit."""
    cost = LinearCost()
    for units in (10, 20, 50, 200):
        cost.add(units, fixed_s + slope_s * units)
    return Pace(unit_s=unit_s, talkers=talkers, context=0, cost=cost)


def rule(first: int = 0) -> BlockRule:
    return BlockRule(
        step=10,
        first=first,
        most=200,
        unit_audio_s=UNIT_S,
        held_back_s=HELD_BACK_S,
    )


def test_first_block_is_ten_units_on_a_fast_machine_and_twenty_on_a_slow_one() -> None:
    fast, slow = pace(0.01, slope_s=0.001), pace(0.03, slope_s=0.02)
    assert rule().size(10, None, fast) == 10
    assert rule().size(10, None, slow) == 0
    assert rule().size(20, None, slow) == 20


def test_a_block_waits_for_ten_more_units_while_the_listener_has_enough() -> None:
    assert rule().size(20, 3.0, pace(slope_s=0.001)) == 0


def test_a_block_goes_out_before_the_listener_runs_dry() -> None:
    # ten more units would take 0.2 s and their decoding 0.03 s; 0.3 s are kept as a reserve
    assert rule().size(20, 0.52, pace(slope_s=0.001)) == 20


def test_a_block_goes_out_earlier_when_others_are_decoded_in_between() -> None:
    assert rule().size(20, 0.7, pace(slope_s=0.001)) == 0
    assert rule().size(20, 0.7, pace(slope_s=0.001, talkers=20)) == 20


def test_blocks_are_whole_steps_and_never_larger_than_the_largest() -> None:
    assert rule().size(29, 0.1, pace()) == 20
    assert rule().size(500, 99.0, pace()) == 200


def test_nothing_is_decoded_from_less_than_a_step() -> None:
    assert rule().size(9, 0.0, pace()) == 0


def test_a_machine_that_falls_behind_with_small_blocks_makes_larger_ones() -> None:
    """0.6 s per block: 10 units would take 0.8 s for 0.8 s of sound, 20 take 1.0 s for 1.6 s."""
    slow = pace(fixed_s=0.61)
    assert rule().size(10, -5.0, slow) == 0
    assert rule().size(20, -5.0, slow) == 20


def test_a_machine_too_slow_for_any_block_still_speaks_before_the_end() -> None:
    hopeless = pace(unit_s=0.2, fixed_s=0.5)
    assert rule().size(20, -5.0, hopeless) == 20


def test_a_block_is_no_longer_than_others_can_wait() -> None:
    slow = {"unit_s": 0.001, "slope_s": 0.0095}
    assert rule().size(150, 99.0, pace(**slow, talkers=2)) == 50
    assert rule().size(150, 99.0, pace(**slow)) == 0


def test_blocks_of_a_seeded_reply_double_whatever_the_clock_says() -> None:
    assert [rule().scheduled(i) for i in range(7)] == [10, 20, 40, 80, 160, 200, 200]
    assert rule(first=20).scheduled(1) == 40


def test_blocks_grow_without_a_gap_when_speech_is_written_faster_than_it_is_heard() -> None:
    """A reply of 400 units at 50 units/s is simulated: no gap, and ever fewer, larger blocks."""
    machine, one = pace(0.02, slope_s=0.002, fixed_s=0.05), rule()
    playback, clock, pending, blocks = Playback(), 0.0, 0, []
    for _ in range(400):
        clock, pending = clock + 0.02, pending + 1
        ahead = playback.ahead_s(clock)
        assert ahead is None or ahead > 0.0, f"silence at {clock:.2f} s after {blocks}"
        if units := one.size(pending, ahead, machine):
            clock += machine.decode_s(units)
            playback.sent(units * UNIT_S - (0 if blocks else HELD_BACK_S), clock)
            pending -= units
            blocks.append(units)
    assert blocks[0] in (10, 20)
    assert max(blocks) >= 60
    assert len(blocks) <= 10


def test_cost_is_a_line_through_what_was_measured() -> None:
    cost = LinearCost()
    assert cost.predict(10) == 0.0
    cost.add(10, 0.3)
    assert cost.predict(20) == pytest.approx(0.6)
    for size in (10, 20, 40, 80):
        cost.add(size, 0.1 + 0.01 * size)
    assert cost.predict(60) == pytest.approx(0.7, rel=0.25)


def test_after_a_gap_the_listener_clock_starts_again() -> None:
    playback = Playback()
    playback.sent(1.0, now_s=10.0)
    assert playback.ahead_s(10.5) == pytest.approx(0.5)
    playback.sent(1.0, now_s=15.0)
    assert playback.ahead_s(15.0) == pytest.approx(1.0)


def test_cost_of_nothing_is_no_cost() -> None:
    """A reply without a unit once made the next prediction divide by zero."""
    cost = LinearCost()
    cost.add(0, 0.01)
    assert cost.predict(10) == 0.0
