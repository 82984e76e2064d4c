"""Who reads and writes what, in plain Python (spec: opens2s 11; defects B5, B7)."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from omnispeech.engine.interleave import Interleaver, Rules

TEXT_END, SPEECH_END = 1, 2


def rules(**changes: Any) -> Rules:
    values: dict[str, Any] = {
        "read": 2,
        "write": 4,
        "text_limit": 100,
        "unit_limit": 50,
        "text_end": frozenset([TEXT_END]),
        "speech_end": frozenset([SPEECH_END]),
    }
    return Rules(**{**values, **changes})


def play(
    rules: Rules, text: list[int], units: list[int]
) -> tuple[Interleaver, list[tuple[int | None, int]]]:
    """Feeds scripted ids; returns what the speech LM was given: (lead, number of states)."""
    turn, inputs = Interleaver(rules), []
    text_ids, unit_ids = iter(text), iter(units)
    while not turn.done:
        if turn.wants_text:
            turn.add_text(next(text_ids))
        if turn.wants_speech:
            step = turn.next_input()
            if step is None:
                break
            inputs.append((step.lead, len(step.states)))
            turn.add_unit(next(unit_ids))
    return turn, inputs


def test_speech_reads_speaker_and_states_then_units_then_unit_and_states() -> None:
    _, inputs = play(rules(), [9, 9, 9, TEXT_END], [11, 12, 13, 14, 15, SPEECH_END])
    assert inputs == [(None, 2), (11, 0), (12, 0), (13, 0), (14, 2), (15, 0)]


def test_end_of_text_in_mid_span_hands_over_what_there_is() -> None:
    turn, inputs = play(rules(), [9, 9, TEXT_END], [11, 12, 13, 14, SPEECH_END])
    assert inputs[-1] == (14, 1)
    assert (turn.text_finish, turn.speech_finish) == ("stop", "stop")


def test_speech_end_before_the_text_has_ended_cuts_only_its_span_in_compatible_mode() -> None:
    compatible = rules(compatible=True)
    turn, inputs = play(compatible, [9, 9, 9, 9, TEXT_END], [11, SPEECH_END, 13, 14, 15, 16, 17, 2])
    assert inputs[2] == (SPEECH_END, 2)
    assert turn.unit_ids == [11, SPEECH_END, 13, 14, 15, 16, 17, SPEECH_END]


def test_no_end_id_may_be_chosen_before_the_text_has_ended() -> None:
    turn = Interleaver(rules())
    turn.add_text(9)
    turn.add_text(9)
    turn.next_input()
    assert turn.choice == "units"
    for unit in (11, 12, 13, 14):
        turn.add_unit(unit)
    turn.add_text(TEXT_END)
    turn.next_input()
    assert turn.choice == "units_or_end"


def test_unit_limit_never_cuts_the_text() -> None:
    turn, _ = play(rules(unit_limit=3), [9] * 20 + [TEXT_END], [11] * 200)
    assert len(turn.text_ids) == 21
    assert turn.text_finish == "stop"
    assert turn.speech_finish == "length"
    assert len(turn.unit_ids) == 10 * 4 + 3


def test_unit_limit_stops_everything_in_compatible_mode() -> None:
    turn, _ = play(rules(unit_limit=9, compatible=True), [9] * 24, [11] * 99)
    assert (len(turn.text_ids), len(turn.unit_ids)) == (8, 9)
    assert (turn.text_finish, turn.speech_finish) == ("length", "length")


def test_llm_runs_ahead_only_as_far_as_it_may() -> None:
    turn = Interleaver(rules(run_ahead=6))
    while turn.wants_text:
        turn.add_text(9)
    assert turn.ahead == 6


def test_llm_that_may_not_run_ahead_waits_for_the_span_to_be_written() -> None:
    turn = Interleaver(rules())
    turn.add_text(9)
    turn.add_text(9)
    assert not turn.wants_text
    turn.next_input()
    assert not turn.wants_text
    for unit in (11, 12, 13, 14):
        turn.add_unit(unit)
    assert turn.needs_text


@given(
    read=st.integers(1, 5),
    write=st.integers(1, 9),
    text=st.lists(st.just(9), max_size=40),
    run_ahead=st.integers(0, 30),
    unit_limit=st.integers(1, 60),
)
def test_running_ahead_changes_no_unit(
    read: int, write: int, text: list[int], run_ahead: int, unit_limit: int
) -> None:
    script = [*text, TEXT_END]
    units = [11 + i % 7 for i in range(2000)]
    slow = rules(read=read, write=write, unit_limit=unit_limit)
    fast = rules(read=read, write=write, unit_limit=unit_limit, run_ahead=run_ahead)
    one, inputs = play(slow, script, units)
    other, inputs_ahead = play(fast, script, units)
    assert one.unit_ids == other.unit_ids
    assert inputs == inputs_ahead
    assert len(one.unit_ids) <= slow.most_units
