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


def played(
    rules: Rules, words: int, call: int, units: list[int]
) -> tuple[Interleaver, list[tuple[int | None, int]]]:
    """Words that are spoken, then a call, which is known for one at its second token."""
    turn, inputs = Interleaver(rules), []
    text, unit_ids = iter([*[9] * (words + call), TEXT_END]), iter(units)
    while not turn.done:
        if turn.wants_text:
            if len(turn.text_ids) == words + 1:
                turn.cut()
            turn.add_text(next(text), held=len(turn.text_ids) >= words)
        if turn.wants_speech:
            step = turn.next_input()
            assert step is not None
            inputs.append((step.lead, len(step.states)))
            turn.add_unit(next(unit_ids))
    return turn, inputs


def test_text_alone_is_over_with_its_text() -> None:
    turn = Interleaver(rules(speech=False))
    for _ in range(5):
        assert turn.needs_text and turn.wants_text and not turn.wants_speech
        turn.add_text(9)
    turn.add_text(TEXT_END)
    assert turn.done and turn.silent
    assert (turn.text_finish, turn.speech_finish, turn.ahead) == ("stop", "stop", 0)
    assert turn.rules.speech_positions == 0


def test_what_is_held_is_not_read_until_the_text_goes_on_or_ends() -> None:
    turn = Interleaver(rules(run_ahead=9))
    turn.add_text(9)
    turn.add_text(9, held=True)
    assert (turn.ahead, turn.wants_speech, turn.needs_text) == (1, False, True)
    turn.add_text(9)
    assert turn.ahead == 3
    turn.add_text(TEXT_END, held=True)
    assert turn.ahead == 4


def test_a_cut_before_the_first_word_is_silent() -> None:
    turn = Interleaver(rules())
    turn.add_text(9, held=True)
    turn.cut()
    assert turn.silent and turn.speech_finish == "stop" and not turn.done
    turn.add_text(9)
    assert (turn.ahead, turn.needs_text) == (0, True)
    turn.add_text(TEXT_END)
    assert turn.done


def test_after_a_cut_the_words_are_spoken_until_the_end_id_of_a_last_span() -> None:
    turn, inputs = played(rules(), 3, 10, [11, 12, 13, 14, 15, 16, 17, 18, 19, SPEECH_END])
    assert turn.spoken_end == 3
    assert [states for _, states in inputs] == [2, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert (turn.speech_finish, turn.text_finish) == ("stop", "stop")


def test_a_second_cut_changes_nothing() -> None:
    turn = Interleaver(rules())
    turn.add_text(9)
    turn.cut()
    turn.add_text(9)
    turn.cut()
    assert turn.spoken_end == 1


@given(
    read=st.integers(1, 5),
    words=st.integers(0, 12),
    call=st.integers(1, 30),
    run_ahead=st.integers(0, 30),
    unit_limit=st.integers(1, 30),
    units=st.lists(st.sampled_from([11, 12, SPEECH_END]), min_size=400, max_size=400),
)
def test_running_ahead_into_a_call_changes_no_unit(
    read: int, words: int, call: int, run_ahead: int, unit_limit: int, units: list[int]
) -> None:
    slow = rules(read=read, unit_limit=unit_limit)
    fast = rules(read=read, unit_limit=unit_limit, run_ahead=run_ahead)
    one, inputs = played(slow, words, call, units)
    other, inputs_ahead = played(fast, words, call, units)
    assert one.unit_ids == other.unit_ids
    assert inputs == inputs_ahead
    assert len(one.unit_ids) <= slow.most_units
