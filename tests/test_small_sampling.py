"""What is right with the likeliest words stays right when words and units are drawn."""

import pytest
from golden_models import Caller, run
from small_models import ANSWERS, asking, small_models

from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import Done, TurnRequest

CHEAP = DecoderConfig(euler_steps=1)  # nobody listens here
SEEDS = range(10)
STEPS = 500  # of the engine: far more than answers that end take
GREEDY = {"temperature": 0.0, "speech_temperature": 0.0}


def answers(name: str, requests: int, **settings: float) -> list[Caller]:
    """Of one question, asked again and again with other seeds."""
    engine = Conversations(small_models(), EngineConfig(), CHEAP)
    callers = [
        Caller(engine, TurnRequest(messages=(asking(name),), seed=seed, **settings))
        for seed in SEEDS[:requests]
    ]
    run(engine, STEPS)
    return callers


def check_whole(caller: Caller) -> None:
    """It ended by itself, and had time to say each of its words."""
    done = caller.events[-1]
    assert isinstance(done, Done)
    assert done.text_finish == done.speech_finish == "stop"
    words = done.text_tokens - 3  # a full stop, and two ends
    assert 1 <= words < 9 and 4 * words < done.units < 45


@pytest.mark.parametrize("name", ["sum", "unknown"])
def test_ten_draws_give_ten_right_answers_that_end(name: str) -> None:
    callers = answers(name, 10)
    assert [caller.text for caller in callers] == [ANSWERS[name]] * 10
    for caller in callers:
        check_whole(caller)


@pytest.mark.parametrize("name", ANSWERS)
def test_the_likeliest_words_are_the_right_answer(name: str) -> None:
    (caller,) = answers(name, 1, **GREEDY)
    assert caller.text == ANSWERS[name]
    check_whole(caller)
