"""What a reply was like for its listener, and what counts as one: a clock that the test sets."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest
from fake_engine import DONE, RATE_HZ, FakeEngine, sound

from omnispeech.engine.events import (
    AudioDelta,
    Done,
    Event,
    Message,
    Text,
    TextDelta,
    TurnRequest,
)
from omnispeech.errors import GenerationError, NotReady, Overloaded, Stopped
from omnispeech.server.admission import Admission, Fate
from omnispeech.server.reply_record import Piece, ReplyRecord, leading_silence, played

HELLO = TurnRequest(messages=(Message("user", (Text("hello"),)),))


def test_a_player_that_is_never_late_has_no_underrun() -> None:
    heard = played([Piece(1.0, 0.5), Piece(1.2, 0.5), Piece(1.9, 0.5)])
    assert (heard.underrun_s, heard.longest_wait_s) == (0, 0)


def test_a_player_waits_for_each_late_piece_and_plays_on_from_there() -> None:
    heard = played([Piece(0.0, 0.5), Piece(1.0, 0.25), Piece(1.25, 0.25), Piece(1.75, 0.5)])
    assert (heard.underrun_s, heard.longest_wait_s) == (0.5 + 0.25, 0.5)


def test_sound_that_came_early_covers_a_gap() -> None:
    assert played([Piece(0.0, 0.5), Piece(0.0, 1.0), Piece(1.5, 0.5)]).underrun_s == 0


@pytest.mark.parametrize(
    ("samples", "quiet"),
    [([0, 0, 103, 104], 3), ([-103, -104, 0], 1), ([-32768], 0), ([0, 50], 2), ([], 0)],
)
def test_leading_silence_ends_at_the_first_sample_that_can_be_heard(
    samples: list[int], quiet: int
) -> None:
    assert leading_silence(np.array(samples, "<i2").tobytes()) == quiet


class Clock:
    """Each step of the engine takes as long as the test says."""

    def __init__(self, *waits_s: float) -> None:
        self.now_s = 100.0
        self._waits = list(waits_s)

    def __call__(self) -> float:
        return self.now_s

    def step(self) -> None:
        self.now_s += self._waits.pop(0) if self._waits else 0.0


class Timed(FakeEngine):
    """Turns the clock on before each event."""

    def __init__(self, clock: Clock, *events: Event | Exception) -> None:
        super().__init__(*events)
        self.clock = clock

    async def answer(self, request: TurnRequest) -> AsyncGenerator[Event, None]:
        async with aclosing(super().answer(request)) as events:
            async for event in events:
                self.clock.step()
                yield event


class Watched:
    """An admission with such an engine, and what it counted."""

    def __init__(self, clock: Clock, *events: Event | Exception) -> None:
        self.clock = clock
        self.records: list[ReplyRecord] = []
        self.guesses: list[Fate] = []
        self.admission = Admission(
            Timed(clock, *events), self.records.append, self.guesses.append, clock
        )

    @property
    def record(self) -> ReplyRecord:
        (one,) = self.records
        return one


SILENCE = AudioDelta(bytes(2 * RATE_HZ))  # 1 s
SECOND = sound(RATE_HZ)
WHOLE = (TextDelta("a"), SILENCE, SECOND, DONE)


async def drained(events: AsyncGenerator[Event, None]) -> list[Event]:
    return [event async for event in events]


async def test_first_text_and_first_sound_count_from_the_question_and_silence_is_no_sound() -> None:
    watched = Watched(Clock(0.25, 0.5, 0.25, 0.5), *WHOLE)
    await drained(watched.admission.answer(HELLO))
    record = watched.record
    assert record.after_question_s(record.first_text_s) == 0.25
    assert record.after_question_s(record.first_sound_s) == 1.0
    assert record.silence_s == pytest.approx(1.0 + 104 / RATE_HZ)
    assert (record.total_s, record.audio_s, record.outcome) == (1.5, 2.0, "length")


async def test_a_reply_of_silence_has_no_first_sound() -> None:
    watched = Watched(Clock(), SILENCE, DONE)
    await drained(watched.admission.answer(HELLO))
    assert watched.record.first_sound_s is None


async def test_a_guess_that_was_right_counts_from_the_moment_it_was() -> None:
    watched = Watched(Clock(0.25, 0.25, 0.5, 0.5), *WHOLE)
    guess = watched.admission.guess(HELLO)
    events = guess.events
    await anext(events)  # the text, 0.25 s after the guess
    watched.clock.now_s += 0.125
    guess.commit()
    await drained(events)
    record = watched.record
    assert watched.guesses == ["used"]
    assert record.after_question_s(record.first_text_s) == 0
    assert record.after_question_s(record.first_sound_s) == 0.75
    assert record.total_s == 1.25


async def test_what_a_guess_had_ready_is_handed_over_when_it_is_committed() -> None:
    watched = Watched(Clock(0.1, 0.1, 5.0), SECOND, SECOND, DONE)
    guess = watched.admission.guess(HELLO)
    await drained(guess.events)
    assert watched.records == []
    guess.commit()
    record = watched.record
    assert [at_s for at_s, _ in record.handed_over] == [watched.clock.now_s] * 2
    assert record.total_s == 0
    assert watched.admission.open == 0


async def test_a_guess_thrown_away_counts_as_no_reply() -> None:
    watched = Watched(Clock(), *WHOLE)
    guess = watched.admission.guess(HELLO)
    await anext(guess.events)
    guess.throw_away()
    await guess.events.aclose()
    assert (watched.records, watched.guesses) == ([], ["thrown_away"])
    assert watched.admission.open == 0


@pytest.mark.parametrize(
    ("error", "outcome"), [(Overloaded("full"), "unavailable"), (GenerationError("x"), "failed")]
)
async def test_a_guess_that_failed_counts_once_it_is_committed(
    error: Exception, outcome: str
) -> None:
    watched = Watched(Clock(), error)
    guess = watched.admission.guess(HELLO)
    with pytest.raises(type(error)):
        await anext(guess.events)
    assert watched.records == []
    guess.commit()
    assert watched.record.outcome == outcome


async def test_the_queue_counts_only_while_the_caller_waits() -> None:
    watched = Watched(Clock(), SECOND, replace(DONE, queue_s=1.0))
    guess = watched.admission.guess(HELLO)
    watched.clock.now_s += 0.75
    guess.commit()
    await drained(guess.events)
    assert watched.record.queue_s == 0.25


async def test_leaving_early_is_a_cancelled_reply() -> None:
    watched = Watched(Clock(), *WHOLE)
    events = watched.admission.answer(HELLO)
    await anext(events)
    await events.aclose()
    assert watched.record.outcome == "cancelled"


async def test_a_cut_reaches_a_reply_whose_reader_is_busy_at_its_next_event() -> None:
    watched = Watched(Clock(), *WHOLE)
    events = watched.admission.answer(HELLO)
    await anext(events)
    watched.admission.cut()
    with pytest.raises(Stopped, match="ask again"):
        await anext(events)
    assert watched.record.outcome == "cut"


async def test_nothing_begins_once_the_server_stops() -> None:
    watched = Watched(Clock(), *WHOLE)
    watched.admission.stop()
    with pytest.raises(NotReady):
        await anext(watched.admission.answer(HELLO))
    assert watched.record.outcome == "unavailable"


async def test_a_time_out_of_the_engine_is_no_cut() -> None:
    watched = Watched(Clock(), TimeoutError("the engine's own"))
    with pytest.raises(TimeoutError, match="own"):
        await anext(watched.admission.answer(HELLO))
    assert watched.record.outcome == "failed"


async def test_done_is_kept_with_the_reply() -> None:
    watched = Watched(Clock(), *WHOLE)
    events = await drained(watched.admission.answer(HELLO))
    assert isinstance(events[-1], Done)
    assert watched.record.done == DONE
