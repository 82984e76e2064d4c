"""Sizes of blocks by the speed of the machine (spec: decoder 8)."""

import pytest

from omnispeech.engine.playback import BlockRule, DecodeTime, LinearCost, Playback

UNIT_S = 0.08


def decode_time(seconds_per_unit: float = 0.0, fixed_s: float = 0.0) -> DecodeTime:
    time = DecodeTime(unit_audio_s=UNIT_S, held_back_s=34 * 256 / 22050)
    for units in (10, 20, 50):
        time.cost.add(units, fixed_s + seconds_per_unit * units)
    return time


def rule(first: int = 0, fixed: int = 0) -> BlockRule:
    return BlockRule(step=10, first=first, most=200, fixed=fixed)


def test_first_block_is_ten_units_on_a_fast_machine_and_twenty_on_a_slow_one() -> None:
    fast, slow = decode_time(0.001), decode_time(0.02)
    assert rule().size(10, None, unit_s=0.01, decode=fast) == 10
    assert rule().size(10, None, unit_s=0.03, decode=slow) == 0
    assert rule().size(20, None, unit_s=0.03, decode=slow) == 20


def test_a_block_waits_for_ten_more_units_while_the_listener_has_enough() -> None:
    assert rule().size(20, ahead_s=3.0, unit_s=0.02, decode=decode_time(0.001)) == 0


def test_a_block_goes_out_before_the_listener_runs_dry() -> None:
    # ten more units would take 0.2 s and their decoding 0.03 s; 0.3 s are kept as a reserve
    assert rule().size(20, ahead_s=0.52, unit_s=0.02, decode=decode_time(0.001)) == 20


def test_blocks_are_whole_steps_and_never_larger_than_the_largest() -> None:
    assert rule().size(29, ahead_s=0.1, unit_s=0.02, decode=decode_time()) == 20
    assert rule().size(500, ahead_s=99.0, unit_s=0.02, decode=decode_time()) == 200


def test_nothing_is_decoded_from_less_than_a_step() -> None:
    assert rule().size(9, ahead_s=0.0, unit_s=0.02, decode=decode_time()) == 0


def test_compatible_blocks_all_have_the_same_size() -> None:
    assert rule(fixed=24).size(23, None, unit_s=1.0, decode=decode_time()) == 0
    assert rule(fixed=24).size(60, -5.0, unit_s=0.0, decode=decode_time()) == 24


def test_blocks_grow_without_a_gap_when_speech_is_written_faster_than_it_is_heard() -> None:
    """A reply of 400 units at 50 units/s is simulated: no gap, and ever fewer, larger blocks."""
    time, one = decode_time(0.002, fixed_s=0.05), rule()
    playback, clock, pending, blocks = Playback(), 0.0, 0, []
    for _ in range(400):
        clock, pending = clock + 0.02, pending + 1
        ahead = playback.ahead_s(clock)
        assert ahead is None or ahead > 0.0, f"silence at {clock:.2f} s after {blocks}"
        if units := one.size(pending, ahead, 0.02, time):
            clock += time.seconds(units)
            playback.sent(units * UNIT_S - (0 if blocks else time.held_back_s), clock)
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
