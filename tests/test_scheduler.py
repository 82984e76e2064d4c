"""Who joins, who goes first: no tensors, no clock but the one passed in."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omnispeech.engine.events import Message, Text, TurnRequest
from omnispeech.engine.interleave import Rules
from omnispeech.engine.pace import BlockRule, LinearCost
from omnispeech.engine.sampling import Sampler
from omnispeech.engine.scheduler import Scheduler
from omnispeech.engine.session import Session
from omnispeech.layers.kv_cache import Row

REQUEST = TurnRequest(messages=(Message("user", (Text("?"),)),))
RULES = Rules(
    read=2,
    write=4,
    text_limit=100,
    unit_limit=50,
    text_end=frozenset([1]),
    speech_end=frozenset([2]),
    run_ahead=8,
)


class Memory:
    """Positions, given and taken back."""

    def __init__(self, free: int = 10_000) -> None:
        self.free = free

    def enter(self, session: Session) -> bool:
        if session.prompt_length > self.free:
            return False
        self.free -= session.prompt_length
        session.llm_row = Row(0, session.prompt_length)
        return True

    def leave(self, session: Session) -> None:
        self.free += session.prompt_length


def scheduler(memory: Memory | None = None, **settings: int) -> Scheduler:
    memory = memory or Memory()
    return Scheduler(
        max_running=settings.get("max_running", 8),
        prefill_tokens=settings.get("prefill_tokens", 16),
        enter=memory.enter,
        leave=memory.leave,
        block_rule=BlockRule(step=10, first=10, most=100, unit_audio_s=0.08, held_back_s=0.4),
        decode_cost=LinearCost(),
        fixed_block=settings.get("fixed_block", 0),
    )


def session(created_s: float = 0.0, length: int = 40, *, heard: bool = True) -> Session:
    nothing: Any = None
    one = Session(
        request=REQUEST,
        rules=RULES,
        prompt=[],
        features=[],
        valid_frames=[],
        audio_lengths=[],
        key=range(length),
        text_sampler=Sampler(),
        speech_sampler=Sampler(),
        text_stream=nothing,
        unit_audio_s=0.08,
        seed=0,
        emit=lambda event: None,
        created_s=created_s,
        prompt_vectors=np.zeros(1) if heard else nothing,  # type: ignore[arg-type]
    )
    one.vocoder = SimpleNamespace(context=0)  # type: ignore[assignment]
    return one


def talking(created_s: float = 0.0, *, heard_until_s: float | None = None) -> Session:
    """Its prompt is read and two tokens are written; its listener runs dry at `heard_until_s`."""
    one = session(created_s)
    one.interleaver.add_text(9)
    one.interleaver.add_text(9)
    if heard_until_s is not None:
        one.playback.sent(heard_until_s, now_s=0.0)
    return one


def started(*sessions: Session, **settings: int) -> Scheduler:
    one = scheduler(**settings)
    for each in sessions:
        one.insert(each)
    one.update()
    for each in sessions:
        if each.interleaver.text_ids and each.llm_row:
            each.llm_row.length = each.prompt_length
    return one


def test_first_come_first_served_even_if_a_smaller_one_would_fit() -> None:
    memory = Memory(free=50)
    one = scheduler(memory)
    first, large, small = session(length=40), session(length=30), session(length=5)
    for each in (first, large, small):
        one.insert(each)
    one.update()
    assert one.running == [first]
    first.cancelled = True
    one.update()
    assert one.running == [large, small]


def test_no_more_rows_than_the_setting_allows() -> None:
    one = started(*(session() for _ in range(5)), max_running=3)
    assert (len(one.running), len(one.waiting)) == (3, 2)


def test_cancelled_session_is_never_prefilled() -> None:
    gone = session()
    gone.cancelled = True
    one = started(gone)
    assert one.running == []
    assert one.llm_turns(0.0) == []


def test_memory_of_a_cancelled_session_is_given_back_once() -> None:
    memory = Memory(free=100)
    one, gone = scheduler(memory), session(length=60)
    one.insert(gone)
    one.update()
    gone.cancelled = True
    one.update()
    one.update()
    assert memory.free == 100


def test_prompt_is_read_in_small_pieces_while_somebody_talks_else_in_large_ones() -> None:
    assert [t.prompt_positions for t in started(session(length=40)).llm_turns(0.0)] == [40]
    assert [t.prompt_positions for t in started(session(length=9000)).llm_turns(0.0)] == [2048]
    turns = started(session(), talking()).llm_turns(0.0)
    assert [t.prompt_positions for t in turns if t.prompt_positions] == [16]


def test_a_prompt_with_sound_is_heard_before_it_is_read() -> None:
    deaf = session(heard=False)
    one = started(deaf)
    assert one.to_hear(0.0) is deaf
    assert one.llm_turns(0.0) == []


def test_unheard_replies_come_first_oldest_first_then_the_one_that_runs_dry_soonest() -> None:
    late, early = talking(created_s=2.0), talking(created_s=1.0)
    dry, soon = talking(heard_until_s=0.9), talking(heard_until_s=0.5)
    one = started(dry, late, soon, early)
    assert one.speech_rows(0.0) == [early, late, soon, dry]


def test_a_reply_far_ahead_of_its_listener_stands_back_for_others() -> None:
    comfortable, hurried = talking(heard_until_s=5.0), talking(heard_until_s=0.4)
    one = started(comfortable, hurried)
    assert one.speech_rows(0.0) == [hurried]
    hurried.cancelled = True
    assert one.speech_rows(0.0) == [comfortable]


def test_llm_rows_run_ahead_only_when_nobody_waits_for_sound() -> None:
    ahead, unheard = talking(heard_until_s=0.5), talking()
    for each in (ahead, unheard):
        each.interleaver.next_input()  # now writing units: neither needs text
    one = started(ahead, unheard)
    assert one.llm_turns(0.0) == []
    unheard.cancelled = True
    assert [t.session for t in one.llm_turns(0.0)] == [ahead]


def test_llm_rows_that_run_ahead_ride_along_with_one_that_is_needed() -> None:
    ahead, unheard, needy = talking(heard_until_s=0.5), talking(), session()
    for each in (ahead, unheard):
        each.interleaver.next_input()
    needy.interleaver.add_text(9)
    one = started(ahead, unheard, needy)
    assert {id(t.session) for t in one.llm_turns(0.0)} == {id(ahead), id(unheard), id(needy)}


def test_the_most_urgent_block_is_decoded_first() -> None:
    calm, dry = talking(heard_until_s=0.9), talking(heard_until_s=0.1)
    for each in (calm, dry):
        each.pending_units = list(range(25))
    block = started(calm, dry).block(0.0, unit_s=0.1)
    assert block is not None
    assert (block.session, block.units, block.final) == (dry, 20, False)


def test_the_end_of_a_reply_can_wait_while_somebody_hurries() -> None:
    ended, hurried = talking(heard_until_s=5.0), talking(heard_until_s=0.4)
    ended.interleaver.speech_finish = "stop"
    one = started(ended, hurried)
    assert one.block(0.0, unit_s=0.1) is None
    assert one.block(4.5, unit_s=0.1) is not None


def test_the_last_block_takes_what_is_left_and_is_final() -> None:
    one = talking(heard_until_s=0.5)
    one.pending_units = list(range(107))
    one.interleaver.speech_finish = "stop"
    engine = started(one)
    first = engine.block(0.0, unit_s=0.1)
    assert first is not None and (first.units, first.final) == (100, False)
    one.pending_units = one.pending_units[100:]
    last = engine.block(0.0, unit_s=0.1)
    assert last is not None and (last.units, last.final) == (7, True)


def test_a_reply_that_ended_with_a_whole_block_is_still_finalised() -> None:
    one = talking(heard_until_s=0.5)
    one.interleaver.speech_finish = "stop"
    last = started(one).block(0.0, unit_s=0.1)
    assert last is not None and (last.units, last.final) == (0, True)


def test_compatible_blocks_all_have_the_same_size() -> None:
    one = talking()
    engine = started(one, fixed_block=24)
    sizes = []
    for pending in (23, 24, 60):
        one.pending_units = list(range(pending))
        block = engine.block(0.0, unit_s=1.0)
        sizes.append(block and block.units)
    assert sizes == [None, 24, 24]


@pytest.mark.parametrize("written_at_once", [1, 7, 1000])
def test_blocks_of_a_seeded_reply_do_not_depend_on_how_fast_it_is_written(
    written_at_once: int,
) -> None:
    """30 units fill the blocks of 10 and 20 exactly: the end comes by itself in every case."""
    one = talking()
    one.request = dataclasses.replace(REQUEST, seed=1)
    engine, blocks = started(one), []
    for start in range(0, 30, written_at_once):
        one.pending_units += range(start, min(30, start + written_at_once))
        if len(one.pending_units) + sum(units for units, _ in blocks) == 30 and written_at_once > 9:
            one.interleaver.speech_finish = "stop"
        while (block := engine.block(0.0, unit_s=0.1)) and not block.final:
            blocks.append((block.units, block.final))
            del one.pending_units[: block.units]
            one.blocks += 1
    one.interleaver.speech_finish = "stop"
    last = engine.block(0.0, unit_s=0.1)
    assert last is not None
    assert [*blocks, (last.units, last.final)] == [(10, False), (20, False), (0, True)]


def test_an_error_on_entering_fails_that_session_and_the_next_one_comes_in() -> None:
    memory, told = Memory(), []
    one = scheduler(memory)
    broken, well = session(), session()
    broken.emit = told.append

    def enter(each: Session) -> bool:
        if each is broken:
            raise RuntimeError("no stream")
        return memory.enter(each)

    one._enter = enter
    for each in (broken, well):
        one.insert(each)
    one.update()
    assert one.running == [well]
    assert isinstance(told[0], RuntimeError)


def test_a_reply_that_only_has_to_end_gives_its_place_to_whoever_waits() -> None:
    ended, hurried = talking(heard_until_s=5.0), talking(heard_until_s=0.4)
    ended.interleaver.speech_finish = "stop"
    one = started(ended, hurried, max_running=2)
    one.insert(session())
    block = one.block(0.0, unit_s=0.1)
    assert block is not None and block.session is ended and block.final


def calling(*, flushed: bool = False) -> Session:
    """It has spoken its words, and writes a call; its listener has ten seconds to hear."""
    one = talking(heard_until_s=10.0)
    one.interleaver.cut()
    one.interleaver.speech_finish = "stop"
    one.flushed = flushed
    return one


def test_a_call_is_written_on_however_much_there_is_to_hear() -> None:
    needy = talking(heard_until_s=0.1)
    one = started(caller := calling(), needy)
    assert caller in [turn.session for turn in one.llm_turns(0.0)]
    waiting = talking(heard_until_s=10.0)
    one = started(waiting, talking(heard_until_s=0.1))
    assert waiting not in [turn.session for turn in one.llm_turns(0.0)]


def test_of_a_reply_whose_sound_is_over_no_block_is_decoded() -> None:
    block = started(calling()).block(0.0, 0.0)
    assert block is not None and block.final
    assert started(calling(flushed=True)).block(0.0, 0.0) is None


def test_text_alone_makes_no_block_and_shares_no_sound() -> None:
    silent = session()
    silent.rules = dataclasses.replace(RULES, speech=False)
    silent.interleave(silent.rules)
    silent.interleaver.add_text(9)
    one = started(silent)
    assert one.block(0.0, 0.0) is None
    assert [turn.session for turn in one.llm_turns(0.0)] == [silent]
    other = talking()
    one = started(silent, other, calling(flushed=True))
    assert one._pace(other, 0.0).talkers == 1
