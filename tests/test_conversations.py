"""The engine without its thread, on the golden models."""

from typing import Any

import numpy as np
import pytest
import torch
from golden_models import Caller, conversations, golden_models, question, run

from omnispeech.config import DecoderConfig
from omnispeech.engine.events import AudioDelta, Done, TextDelta
from omnispeech.engine.sampling import NOT_FINITE
from omnispeech.errors import AudioError, GenerationError, RequestError


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


def test_the_same_seed_gives_the_same_reply_to_the_bit() -> None:
    replies = []
    for seed in (3, 3, 4):
        engine = conversations(DecoderConfig(euler_steps=2, first_block=20, max_block=20))
        caller = Caller(engine, question(temperature=1.0, seed=seed))
        run(engine)
        replies.append((caller.text, caller.ids, caller.pcm))
    assert replies[0] == replies[1]
    assert replies[0][1] != replies[2][1]


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


def test_no_id_outside_the_units_is_ever_written_before_the_end() -> None:
    """Defect B5, with random sampling over everything."""
    engine = conversations()
    callers = [Caller(engine, question(seed=i, speech_temperature=5.0)) for i in range(6)]
    run(engine)
    units = golden_models().units
    for caller in callers:
        assert all(i in units for i in caller.ids[1][:-1])
        assert caller.session.vocoder.units == sum(i in units for i in caller.ids[1])


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
    engine = conversations(context_length=64)
    with pytest.raises(RequestError, match=r"\d+ positions, the context has 64"):
        engine.open(question("word " * 200), print)


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
