"""Replies in text alone, and when a text can be heard (spec: opens2s 5, 11)."""

from itertools import pairwise
from typing import Any

import pytest
from golden_models import Caller, conversations, golden_models, question, run

from omnispeech.config import DecoderConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import AudioDelta, Done, TextDelta, TurnRequest
from omnispeech.engine.interleave import Interleaver, Rules
from omnispeech.engine.reply_text import ReplyText

QUICK = DecoderConfig(euler_steps=1, first_block=10)
READ, WRITE = 2, 4  # states and units of a span of the golden model


def written(text: str = "How are you?", **settings: object) -> TurnRequest:
    return question(text, speech=False, **settings)  # type: ignore[arg-type]


def answered(engine: Conversations, request: TurnRequest) -> Caller:
    caller = Caller(engine, request)
    run(engine)
    return caller


def done_of(caller: Caller) -> Done:
    done = caller.events[-1]
    assert isinstance(done, Done)
    return done


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_reply_in_text_says_what_the_spoken_one_says(temperature: float) -> None:
    spoken = answered(conversations(QUICK), question(temperature=temperature))
    text = answered(conversations(QUICK), written(temperature=temperature))
    assert text.ids == (spoken.ids[0], [])
    assert text.text == spoken.text
    assert spoken.pcm and not any(isinstance(event, AudioDelta) for event in text.events)


def test_its_end_tells_of_no_sound() -> None:
    done = done_of(answered(conversations(QUICK), written()))
    assert (done.text_finish, done.speech_finish) == ("length", "stop")
    assert (done.units, done.audio_s, done.first_audio_s) == (0, 0.0, 0.0)
    assert done.text_tokens == 12 and done.first_text_s > 0


def test_it_takes_no_memory_of_the_speech_and_no_decoder() -> None:
    engine = conversations(QUICK)
    caller = Caller(engine, written())
    engine.step()
    assert engine.runner.speech_cache.free_tokens == engine.runner.speech_cache.tokens
    assert caller.session.speech_row is None and not hasattr(caller.session, "vocoder")
    assert not caller.session.conditions


def test_it_may_be_longer_than_the_memory_of_the_speech() -> None:
    settings = {"kv_tokens": 300, "context_length": 300, "max_new_tokens": 200}
    caller = answered(conversations(QUICK, **settings), written(max_new_tokens=200))
    assert len(caller.ids[0]) == 200


def test_a_spoken_turn_that_waits_for_a_written_one_holds_no_memory_meanwhile() -> None:
    engine = conversations(QUICK, kv_tokens=300, context_length=300)
    writing = Caller(engine, written(max_new_tokens=220))
    speaking = Caller(engine, question())
    for _ in range(5):
        engine.step()
    assert engine.scheduler.running == [writing.session]
    assert engine.runner.speech_cache.used_tokens == 0
    run(engine)
    assert done_of(writing).text_tokens == 220 and done_of(speaking).units > 0


def test_the_state_is_not_made_ready_for_a_speech_that_does_not_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(golden_models().language.lm), "speech_condition", lambda *_: 1 / 0)
    assert done_of(answered(conversations(QUICK), written())).text_tokens == 12


def test_written_and_spoken_replies_share_their_calls_and_change_each_other_in_nothing() -> None:
    alone = [
        answered(conversations(QUICK), request(speech_temperature=0.0, max_new_tokens=40)).ids
        for request in (question, written)
    ]
    engine = conversations(QUICK)
    calls: list[int] = []
    original = engine.runner.run_llm

    def counted(turns: list[object]) -> None:
        calls.append(len(turns))
        original(turns)  # type: ignore[arg-type]

    engine.runner.run_llm = counted  # type: ignore[method-assign, assignment]
    together = [
        Caller(engine, request(speech_temperature=0.0, max_new_tokens=40))
        for request in (question, written)
    ]
    run(engine)
    assert [caller.ids for caller in together] == alone
    assert calls.count(2) >= 20


def test_the_caller_of_a_text_does_not_wait_for_the_sound_of_others() -> None:
    """One step, one token: a speaking reply would stand back when it is ahead of its listener."""
    engine = conversations(QUICK)
    Caller(engine, question(max_new_tokens=200))
    for _ in range(30):
        engine.step()
    caller = Caller(engine, written(max_new_tokens=20))
    while not caller.ids[0]:
        engine.step()
    for expected in range(2, 21):
        engine.step()
        assert len(caller.ids[0]) == expected


def test_a_caller_of_a_text_that_leaves_frees_its_row_within_one_step() -> None:
    engine = conversations(QUICK)
    caller = Caller(engine, written(max_new_tokens=500))
    for _ in range(5):
        engine.step()
    said = len(caller.ids[0])
    caller.session.cancelled = True
    engine.step()
    assert engine.idle and len(caller.ids[0]) == said
    read = caller.session.prompt_length + said - 1
    assert engine.runner.prefixes.kept_tokens == engine.runner.llm_cache.used_tokens == read


def test_a_spoken_turn_goes_on_from_a_written_one() -> None:
    """As a transcript, or an answer begun too early, does."""
    engine = conversations(QUICK)
    answered(engine, written())
    again = answered(engine, question(speech_temperature=0.0))
    assert done_of(again).cached_tokens == again.session.prompt_length - 1
    assert again.ids == answered(conversations(QUICK), question(speech_temperature=0.0)).ids


def test_the_compatible_mode_writes_too() -> None:
    caller = answered(conversations(QUICK, compatible=True), written())
    assert done_of(caller).text_tokens == 12 and not caller.pcm


def test_a_text_can_be_heard_from_the_span_on_that_reads_its_first_token() -> None:
    engine = conversations(QUICK)
    models = engine.models
    ids = models.prompt.reply_ids("How are you? I am well.")
    caller = Caller(engine, question(max_new_tokens=60))
    caller.session.script = ids
    run(engine)
    texts = [event for event in caller.events if isinstance(event, TextDelta)]
    spoken = [i for i in range(len(ids)) if models.prompt.decode_text([ids[i]])]
    expected = [i // READ * WRITE * engine.unit_audio_s for i in spoken]
    assert [text.from_s for text in texts] == pytest.approx(expected)
    done = done_of(caller)
    assert engine.unit_audio_s == pytest.approx(done.audio_s / done.units, rel=0.02)


def test_a_character_of_several_tokens_can_be_heard_from_the_first_on() -> None:
    engine = conversations(QUICK)
    prompt = engine.models.prompt
    ids = prompt.reply_ids("aaaa 👩 b")
    caller = Caller(engine, question(max_new_tokens=60))
    caller.session.script = ids
    run(engine)
    texts = [event for event in caller.events if isinstance(event, TextDelta)]
    (woman,) = [text for text in texts if "👩" in text.text]
    stream, first = prompt.text_stream(), 0
    while not stream.holds:
        stream.push([ids[first]])
        first += 1
    assert woman.from_s == pytest.approx((first - 1) // READ * WRITE * engine.unit_audio_s)
    assert all(one.from_s <= other.from_s for one, other in pairwise(texts))


def test_no_text_can_be_heard_before_its_state_was_read() -> None:
    """Whatever was written of the sound when a state is read lies before its text."""
    engine = conversations(QUICK, run_ahead=20)
    caller = Caller(engine, question(max_new_tokens=30))
    before: dict[int, int] = {}
    turn = caller.session.interleaver
    while not engine.idle:
        read = turn._states_read
        units = len(turn.unit_ids)
        engine.step()
        for state in range(read, turn._states_read):
            before[state] = units
    assert before == {i: i // READ * WRITE for i in range(30)}


def test_a_text_alone_is_heard_nowhere() -> None:
    caller = answered(conversations(QUICK), written())
    assert {event.from_s for event in caller.events if isinstance(event, TextDelta)} == {0.0}


def test_the_end_of_a_turn_tells_what_was_sound_and_what_was_known() -> None:
    engine = conversations(QUICK)
    first, second = (answered(engine, question()) for _ in range(2))
    sound = first.session.audio_lengths
    assert done_of(first).audio_tokens == sum(sound) > 0
    assert (done_of(first).cached_tokens, done_of(second).cached_tokens) == (
        0,
        done_of(second).prompt_tokens - 1,
    )
    assert done_of(answered(engine, question(seconds=0))).audio_tokens == 0


def test_a_turn_that_waits_for_a_place_tells_how_long() -> None:
    engine = conversations(QUICK, max_conversations=1)
    first, second = (Caller(engine, question()) for _ in range(2))
    run(engine)
    assert done_of(first).queue_s < done_of(first).total_s
    left_s = first.session.created_s + done_of(first).total_s
    assert second.session.created_s + done_of(second).queue_s >= left_s


def test_an_empty_reply_in_text_is_one_too() -> None:
    engine = conversations(QUICK, text_end=frozenset(range(600)))
    caller = answered(engine, written())
    assert done_of(caller).text_finish == "stop" and len(caller.ids[0]) == 1


class Words:
    """Each token is a word of its own."""

    holds = False

    def __init__(self, *words: str) -> None:
        self._words = words

    def push(self, ids: list[int]) -> str:
        return "".join(self._words[i] for i in ids)

    def finish(self) -> str:
        return ""


def test_what_is_left_of_a_token_can_be_heard_from_that_token_on() -> None:
    words: Any = Words("a ", "b <", "c", "d")
    rules = Rules(
        read=1,
        write=1,
        text_limit=9,
        unit_limit=9,
        text_end=frozenset(),
        speech_end=frozenset(),
    )
    text = ReplyText(words, Interleaver(rules), 1.0, calls=True)
    told = [
        [(e.text, e.from_s) for e in text.push(i) if isinstance(e, TextDelta)] for i in range(4)
    ]
    assert told == [[("a", 0.0)], [(" b", 0.0)], [(" <c", 1.0)], [("d", 3.0)]]
