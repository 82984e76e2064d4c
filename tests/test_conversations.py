"""The engine without its thread, on the golden models."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from golden_models import Caller, conversations, golden_models, question, run

from omnispeech.config import DecoderConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import Audio, AudioDelta, Done, Message, Text, TextDelta, TurnRequest
from omnispeech.engine.sampling import NOT_FINITE
from omnispeech.errors import AudioError, GenerationError, PromptTooLong, RequestError


def test_a_reply_is_text_and_sound_and_then_done() -> None:
    engine = conversations()
    caller = Caller(engine, question())
    run(engine)
    done = caller.events[-1]
    assert isinstance(done, Done)
    assert caller.text
    assert done.units == len(caller.ids[1]) == 5 * 4 + 40  # the last span of 2:4 has no end
    assert len(caller.pcm) / 2 == golden_models().decoder.flow.frames(done.units) * 256
    assert done.audio_s == pytest.approx(len(caller.pcm) / 2 / 22050)


def test_greedy_ids_are_the_same_alone_and_among_seven_others() -> None:
    settings = [
        {"text": f"Question {i}", "seconds": 0.5 * (i % 4), "max_new_tokens": 8 + i, "seed": i}
        for i in range(8)
    ]
    alone = []
    for setting in settings:
        engine = conversations()
        caller = Caller(engine, question(speech_temperature=0.0, **setting))  # type: ignore[arg-type]
        run(engine)
        alone.append(caller.ids)
    engine = conversations()
    together = []
    for setting in settings:  # they join while others are in mid-reply
        together.append(Caller(engine, question(speech_temperature=0.0, **setting)))  # type: ignore[arg-type]
        for _ in range(3):
            engine.step()
    assert len(engine.scheduler.running) == 8
    run(engine)
    assert [caller.ids for caller in together] == alone


def test_the_same_seed_gives_the_same_sound_to_the_bit_alone_and_among_others() -> None:
    """Blocks once followed the clock, and the sound the blocks."""
    replies = []
    for others in (0, 3):
        engine = conversations()
        engine._decode_cost.add(10, 0.001 if others else 5.0)
        for i in range(others):
            Caller(engine, question(temperature=1.0, seed=None, max_new_tokens=5 + i))
        caller = Caller(engine, question(temperature=1.0, seed=3))
        run(engine)
        replies.append((caller.text, caller.ids, caller.pcm))
    assert replies[0] == replies[1]


def test_another_seed_gives_another_reply() -> None:
    engine = conversations()
    one, other = (Caller(engine, question(temperature=1.0, seed=seed)) for seed in (3, 4))
    run(engine)
    assert one.ids != other.ids


def test_a_reply_without_a_unit_ends_without_sound() -> None:
    engine = conversations(
        text_end=frozenset(range(600)), speech_end=golden_models().language.speech_end
    )
    caller = Caller(engine, question(seed=None))
    caller.session.interleaver.rules = replace(caller.session.rules, unit_limit=1)
    silent = Caller(engine, question(seed=None))
    engine.runner.unit_head.choose = lambda states, sessions: [  # type: ignore[method-assign]
        min(golden_models().language.speech_end) for _ in sessions
    ]
    run(engine)
    for each in (caller, silent):
        assert isinstance(each.events[-1], Done)
        assert each.pcm == b""
    assert isinstance(answered_after(engine).events[-1], Done)


def answered_after(engine: Conversations) -> Caller:
    caller = Caller(engine, question(seed=None))
    run(engine)
    return caller


def test_a_call_that_fails_after_the_models_ran_is_made_again_without_a_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tokens of the failed call once stayed in the rows, and were then read twice."""
    import omnispeech.engine.runner as runner

    alone = []
    for text in ("One?", "Two?"):
        engine = conversations()
        alone.append(Caller(engine, question(text, speech_temperature=0.0)))
        run(engine)
    engine = conversations()
    together = [Caller(engine, question(t, speech_temperature=0.0)) for t in ("One?", "Two?")]
    original, calls = runner.choose, iter(range(1000))

    def choose(logits: torch.Tensor, samplers: Any) -> list[int]:
        if len(logits) == 2 and next(calls) % 3 == 1:
            raise RuntimeError("out of memory")
        return original(logits, samplers)

    monkeypatch.setattr(runner, "choose", choose)
    run(engine)
    assert [caller.ids for caller in together] == [caller.ids for caller in alone]


def test_sound_comes_before_the_text_has_ended_and_text_goes_on_without_it() -> None:
    """Defect B1: in the original text and sound wait for each other."""
    engine = conversations()
    caller = Caller(engine, question(max_new_tokens=60))
    run(engine)
    kinds = [type(event) for event in caller.events]
    first_sound = kinds.index(AudioDelta)
    assert TextDelta in kinds[:first_sound]
    assert TextDelta in kinds[first_sound:]


def test_first_sound_takes_the_calls_of_its_own_block_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """10 units at 2:4 need three spans, so 6 LLM states."""
    engine = conversations()
    calls = []
    for name in ("run_llm", "run_speech"):
        method = getattr(engine.runner, name)

        def counted(items: object, name: str = name, method: Any = method) -> None:
            calls.append(name)
            method(items)

        monkeypatch.setattr(engine.runner, name, counted)
    caller = Caller(engine, question(max_new_tokens=200))
    while not caller.pcm:
        engine.step()
    assert (calls.count("run_llm"), calls.count("run_speech")) == (6, 10)


def test_a_caller_that_leaves_frees_its_row_within_one_step() -> None:
    engine = conversations()
    staying, leaving = Caller(engine, question()), Caller(engine, question())
    for _ in range(5):
        engine.step()
    free = engine.runner.speech_cache.free_tokens
    said = len(leaving.ids[0]), len(leaving.ids[1]), len(leaving.events)
    leaving.session.cancelled = True
    engine.step()
    assert engine.scheduler.running == [staying.session]
    assert engine.runner.speech_cache.free_tokens > free
    assert (len(leaving.ids[0]), len(leaving.ids[1]), len(leaving.events)) == said


def test_a_caller_that_leaves_while_waiting_never_starts() -> None:
    engine = conversations(max_conversations=1)
    first, second = Caller(engine, question()), Caller(engine, question())
    second.session.cancelled = True
    run(engine)
    assert isinstance(first.events[-1], Done)
    assert second.events == []


@pytest.mark.parametrize("end", ["whole", "cancelled", "failed"])
def test_nothing_of_a_reply_stays_however_it_ends(end: str) -> None:
    """Defect B4: the original keeps the state of streams that ended with a whole block, failed
    or were left."""
    engine = conversations(DecoderConfig(euler_steps=1, first_block=10))
    caller = Caller(engine, question())
    while not caller.pcm:
        engine.step()
    caller.session.cancelled, caller.session.failed = end == "cancelled", end == "failed"
    run(engine)
    parts = [weakref.ref(part) for part in (caller.session.interleaver, caller.session.vocoder)]
    del caller
    gc.collect()
    assert [part() for part in parts] == [None, None]


def test_all_memory_is_given_back() -> None:
    engine = conversations()
    for _ in range(3):
        Caller(engine, question())
    run(engine)
    kept = engine.runner.prefixes.kept_tokens
    assert engine.runner.llm_cache.free_tokens + kept == 8192
    assert engine.runner.speech_cache.free_tokens == 8192


def test_a_reply_waits_for_memory_and_then_gets_it() -> None:
    engine = conversations(kv_tokens=256, context_length=256)
    callers = [Caller(engine, question(max_new_tokens=8)) for _ in range(5)]
    engine.step()
    assert 0 < len(engine.scheduler.running) < 5
    run(engine)
    assert all(isinstance(caller.events[-1], Done) for caller in callers)


@pytest.mark.parametrize("stage", ["run_llm", "run_speech"])
def test_an_error_in_a_shared_call_reaches_its_own_caller_only(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = conversations()
    well, ill = Caller(engine, question()), Caller(engine, question())
    original = getattr(engine.runner, stage)

    def failing(items: list[object]) -> None:
        if any(getattr(item, "session", item) is ill.session for item in items):
            raise RuntimeError("the device hiccuped")
        original(items)

    for _ in range(4):
        engine.step()
    monkeypatch.setattr(engine.runner, stage, failing)
    run(engine)
    assert isinstance(ill.events[-1], RuntimeError)
    assert isinstance(well.events[-1], Done)
    alone = conversations()
    undisturbed = Caller(alone, question())
    run(alone)
    assert well.ids == undisturbed.ids


def test_an_error_while_sound_is_made_reaches_its_own_caller_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = conversations()
    well, ill = Caller(engine, question()), Caller(engine, question())

    def failing(units: list[int], final: bool) -> torch.Tensor:
        raise RuntimeError("no sound")

    engine.step()
    monkeypatch.setattr(ill.session.vocoder, "push", failing)
    run(engine)
    assert isinstance(ill.events[-1], RuntimeError)
    assert isinstance(well.events[-1], Done)


def test_numbers_that_are_not_finite_are_an_error_and_not_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = conversations()
    caller = Caller(engine, question())
    monkeypatch.setattr("omnispeech.engine.runner.choose", lambda *_: [NOT_FINITE])
    run(engine)
    assert isinstance(caller.events[-1], GenerationError)


def test_no_end_id_and_no_word_is_written_before_the_text_has_ended() -> None:
    """Defect B5, with random sampling over everything and half of the units as end ids."""
    models = golden_models().language
    ends = models.speech_end | {
        models.units.to_id(unit) for unit in range(0, models.units.count, 2)
    }
    engine = conversations(DecoderConfig(euler_steps=1), speech_end=ends)
    callers = [Caller(engine, question(seed=i, speech_temperature=5.0)) for i in range(3)]
    run(engine)
    for caller in callers:
        spoken = [i for i in caller.ids[1] if i in models.units and i not in ends]
        assert spoken == caller.ids[1][: len(spoken)] and len(spoken) >= 20
        assert caller.session.vocoder.units == len(spoken) >= len(caller.ids[1]) - 1


def test_an_id_that_is_no_unit_is_never_spoken() -> None:
    """Defect B5: where end ids and words can be chosen, the original speaks them as unit 0."""
    units = replace(golden_models().language.units, count=100)  # of 256
    engine = conversations(DecoderConfig(euler_steps=1), compatible=True, units=units)
    caller = Caller(engine, question(speech_temperature=5.0))
    run(engine)
    chosen = caller.ids[1]
    assert caller.session.vocoder.units == sum(i in units for i in chosen) < len(chosen)


def test_a_whole_reply_leaves_the_generators_of_the_process_alone() -> None:
    """Defect B6: the original seeds them anew for every block of sound."""
    torch.manual_seed(11)
    before = torch.get_rng_state()
    engine = conversations()
    Caller(engine, question(temperature=1.0))
    run(engine)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_long_prompt_is_read_in_pieces_while_others_talk() -> None:
    engine = conversations(prefill_tokens=16)
    talking = Caller(engine, question(max_new_tokens=100))
    for _ in range(4):
        engine.step()
    joining = Caller(engine, question("word " * 60))
    before, steps = len(talking.ids[1]), engine.steps
    while not joining.ids[0]:
        engine.step()
    assert engine.steps - steps >= joining.session.prompt_length // 16
    assert len(talking.ids[1]) - before >= 4


def test_text_is_never_cut_by_the_units() -> None:
    """Defect B7: in the original 40 units would end the text after 20 tokens at 2:4."""
    engine = conversations()
    caller = Caller(engine, question(max_new_tokens=50))
    run(engine)
    assert len(caller.ids[0]) == 50


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    long = question("word " * 200)
    length = conversations().open(long, print).prompt_length
    with pytest.raises(PromptTooLong, match=f"{length} positions, the context has 64") as refused:
        conversations(context_length=64).open(long, print)
    assert (refused.value.positions, refused.value.room) == (length, 63)
    assert conversations(context_length=length + 1).open(long, print).rules.text_limit == 1


@pytest.mark.parametrize(("wanted", "least"), [(10, 10), (500, 50)])
def test_a_prompt_that_can_be_shortened_leaves_room_for_the_reply(wanted: int, least: int) -> None:
    """For what is wanted, and at most a quarter of the context."""
    engine = conversations(context_length=200)
    length = engine.open(question(), print).prompt_length
    fits = question("How are you?" + "i" * (200 - least - length), max_new_tokens=wanted)
    assert engine.open(fits, print).prompt_length == 200 - least
    longer = question("How are you?" + "i" * (201 - least - length), max_new_tokens=wanted)
    assert engine.open(longer, print).rules.text_limit == min(wanted, least - 1)
    engine.open(replace(fits, can_shorten=True), print)
    with pytest.raises(PromptTooLong) as refused:
        engine.open(replace(longer, can_shorten=True), print)
    assert (refused.value.positions, refused.value.room) == (201 - least, 200 - least)


@pytest.mark.parametrize("parts", [Text("hi"), question().messages[0].content[1]])
def test_b14_too_many_messages_are_refused_before_their_sound_is_heard(
    parts: Text | Audio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omnispeech.audio.features.log_mel", lambda *_, **__: 1 / 0)
    request = TurnRequest(messages=(Message("user", (parts,)),) * 500)
    with pytest.raises(RequestError, match="positions, the context has 2048"):
        conversations(context_length=2048).open(request, print)


def test_b13_a_text_with_the_audio_marker_is_answered() -> None:
    engine = conversations(DecoderConfig(euler_steps=1, first_block=10))
    caller = Caller(engine, question("<|im_audio|> <|im_end|>"))
    run(engine)
    assert caller.session.prompt.count(-200) == 1
    assert isinstance(caller.events[-1], Done)


def test_what_room_is_left_limits_the_reply() -> None:
    engine = conversations(context_length=64)
    caller = Caller(engine, question(max_new_tokens=256))
    run(engine)
    assert len(caller.ids[0]) + caller.session.prompt_length == 64


def test_an_audio_too_short_to_be_heard_is_refused() -> None:
    with pytest.raises(AudioError, match="too short"):
        conversations().open(question(seconds=0.005), print)


@pytest.mark.parametrize("units", [1, 5, 6, 10, 24, 25, 40])
def test_replies_of_every_length_speak_to_their_end(units: int) -> None:
    """Defects B3, B4: the original needs 24 units, and loses the rest if 24 divides them."""
    engine = conversations(unit_limit=units, speech_end=frozenset())
    caller = Caller(engine, question(max_new_tokens=1))
    run(engine)
    assert len(caller.pcm) / 2 == golden_models().decoder.flow.frames(units) * 256
    assert np.frombuffer(caller.pcm, "<i2")[-256:].any()


def test_a_request_of_many_sounds_is_heard_one_sound_per_step() -> None:
    """So that others are not kept waiting for all of them."""
    engine = conversations()
    sounds = tuple(Audio(np.full(16000, 0.01 * i, np.float32)) for i in range(1, 4))
    request = replace(question(), messages=(Message("user", sounds),))
    caller = Caller(engine, request)
    for _ in range(2):
        engine.step()
        assert not caller.ids[0]
    engine.step()
    assert caller.ids[0]


def test_a_reply_whose_stream_cannot_be_opened_gives_its_memory_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = conversations()
    monkeypatch.setattr("omnispeech.engine.conversations.open_stream", lambda *_: 1 / 0)
    caller = Caller(engine, question())
    run(engine)
    assert isinstance(caller.events[-1], ZeroDivisionError)
    assert engine.runner.speech_cache.free_tokens == engine.runner.llm_cache.free_tokens == 8192
