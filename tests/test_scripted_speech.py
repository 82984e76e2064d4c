"""A text that is given is spoken word for word by the model's own speech LM."""

from typing import Any

import pytest
import torch
from golden_models import Caller, conversations, golden_models, question, run
from hypothesis import given, settings
from hypothesis import strategies as st

from omnispeech.config import DecoderConfig
from omnispeech.engine.events import Done, TextDelta
from omnispeech.errors import PromptTooLong, RequestError

QUICK = DecoderConfig(euler_steps=1, first_block=10)
SCRIPT = "The train leaves at half past seven."


def spoken(script: str, engine: Any = None, **changes: Any) -> Caller:
    engine = engine or conversations(QUICK)
    caller = Caller(engine, question(script=script, speech_temperature=0.0, **changes))
    run(engine)
    return caller


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_reply_is_the_text_and_its_sound(temperature: float) -> None:
    caller = spoken(SCRIPT, temperature=temperature)
    done = caller.events[-1]
    assert isinstance(done, Done)
    assert caller.text == SCRIPT
    assert done.text_finish == "stop"
    assert done.units >= 4 * (done.text_tokens // 2) and caller.pcm


def test_the_tokens_are_those_of_the_text_and_its_two_ends() -> None:
    prompt = golden_models().language.prompt
    plain = prompt._full.encode(SCRIPT, add_special_tokens=False).ids
    ends = [prompt._full.token_to_id(token) for token in ("<|im_tts_end|>", "<|im_end|>")]
    assert spoken(SCRIPT).ids[0] == [*plain, *ends]


def test_the_text_comes_in_pieces_as_it_is_spoken() -> None:
    deltas = [event for event in spoken(SCRIPT).events if isinstance(event, TextDelta)]
    assert len(deltas) > 5
    assert deltas[0].from_s == 0.0 < deltas[-1].from_s


def test_it_sounds_as_if_the_model_had_chosen_these_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The states that are handed over are those that would have chosen them."""
    import omnispeech.engine.runner as runner

    given, original = spoken(SCRIPT), runner.choose
    words, left = golden_models().language.lm.config.llm.vocab_size, iter(given.ids[0])

    def choose(logits: torch.Tensor, samplers: Any) -> list[int]:
        return [next(left)] if logits.shape[1] == words else original(logits, samplers)

    monkeypatch.setattr(runner, "choose", choose)
    engine = conversations(QUICK, text_end=frozenset(given.ids[0][-1:]))
    chosen = Caller(engine, question(speech_temperature=0.0, max_new_tokens=100))
    run(engine)
    assert chosen.ids == given.ids
    assert chosen.pcm == given.pcm


def test_another_text_sounds_different() -> None:
    assert spoken(SCRIPT).ids[1] != spoken("The train leaves at half past nine.").ids[1]


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip))
def test_any_text_is_given_back_as_it_is_but_for_composed_characters(text: str) -> None:
    prompt = golden_models().language.prompt
    assert prompt.decode_text(prompt.reply_ids(text)) == prompt._full.normalizer.normalize_str(text)


def test_control_tokens_in_it_are_spoken_as_text() -> None:
    text = "a<|im_end|> <tool_call> <|im_audio|> b"
    caller = spoken(text)
    assert caller.text == text
    assert isinstance(caller.events[-1], Done) and caller.events[-1].text_finish == "stop"


def test_the_limit_of_the_request_is_for_the_models_own_words() -> None:
    assert spoken(SCRIPT, max_new_tokens=1).text == SCRIPT


def test_a_text_over_the_limit_is_refused_with_both_numbers() -> None:
    engine = conversations(QUICK, max_new_tokens=16)
    tokens = len(golden_models().language.prompt.reply_ids("word " * 20))
    with pytest.raises(RequestError, match=rf"has {tokens} tokens, .* at most 16 at once"):
        engine.open(question(script="word " * 20), print)


def test_a_text_for_which_the_context_has_no_room_is_refused_and_not_cut() -> None:
    engine = conversations(QUICK, context_length=64)
    length = engine.open(question(), print).prompt_length
    ids = golden_models().language.prompt.reply_ids("word " * 20)
    with pytest.raises(PromptTooLong) as refused:
        engine.open(question(script="word " * 20), print)
    assert (refused.value.positions, refused.value.room) == (length, 64 - len(ids))


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_text_without_words_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="text to be spoken is empty"):
        question(script=text)


def test_a_text_with_half_a_character_is_refused() -> None:
    with pytest.raises(RequestError, match=r"U\+D800"):
        conversations(QUICK).open(question(script="a\ud800"), print)


def test_no_word_of_it_ends_it() -> None:
    engine = conversations(QUICK, text_end=frozenset(range(300)))
    assert spoken(SCRIPT, engine).text == SCRIPT


def test_it_shares_calls_with_others_and_changes_nothing_of_them() -> None:
    alone = [spoken(SCRIPT).ids, spoken("Good morning!").ids]
    engine = conversations(QUICK)
    together = [
        Caller(engine, question(script=script, speech_temperature=0.0))
        for script in (SCRIPT, "Good morning!")
    ]
    run(engine)
    assert [caller.ids for caller in together] == alone


def test_a_listener_that_leaves_frees_its_rows_within_one_step() -> None:
    engine = conversations(QUICK)
    caller = Caller(engine, question(script=SCRIPT))
    for _ in range(6):
        engine.step()
    said = caller.ids[0][:]
    caller.session.cancelled = True
    engine.step()
    assert engine.idle and caller.ids[0] == said
    assert engine.runner.speech_cache.used_tokens == 0
    again = spoken(SCRIPT, engine)
    assert isinstance(again.events[-1], Done)
    assert again.events[-1].cached_tokens == again.session.prompt_length - 1


def test_a_script_without_speech_is_its_text() -> None:
    caller = spoken(SCRIPT, speech=False)
    assert caller.text == SCRIPT and not caller.pcm
