"""What earlier turns have read is not read again, and changes nothing."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from golden_models import Caller, conversations, golden_models, question, run

from omnispeech.audio import features
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import Audio, Done, Message, Samples, Text, TurnRequest
from omnispeech.engine.prefix_cache import PrefixCache
from omnispeech.layers.kv_cache import KVCache


def sound(frequency: float, seconds: float = 1.0) -> Audio:
    samples = np.sin(np.arange(int(16000 * seconds)) * frequency) * 0.3
    return Audio(samples.astype(np.float32))


def turn(*messages: Message) -> TurnRequest:
    return dataclasses.replace(question(speech_temperature=0.0), messages=messages)


FIRST = Message("user", (Text("Listen: "), sound(0.1)))
ANSWER = Message("assistant", (Text("I did."),))
SECOND = Message("user", (sound(0.2, 2.0), Text(" And this?")))
TOKENIZER = golden_models().language.prompt._full
THOUGHT = len(TOKENIZER.encode("<think>\n\n</think>\n\n<|im_tts_start|>").ids)


def answered(engine: Conversations, request: TurnRequest) -> Caller:
    caller = Caller(engine, request)
    run(engine)
    return caller


def test_the_next_turn_reads_only_what_is_new_and_says_the_same() -> None:
    engine = conversations()
    answered(engine, turn(FIRST))
    again = answered(engine, turn(FIRST, ANSWER, SECOND))
    alone = answered(conversations(), turn(FIRST, ANSWER, SECOND))
    assert alone.session.reused == 0
    assert again.session.reused > 30  # system message, question and its sound
    assert again.ids == alone.ids


def test_sound_that_was_heard_is_not_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = conversations()
    answered(engine, turn(FIRST))
    heard: list[int] = []
    encoder = engine.models.lm.audio_encoder_model
    original = encoder.encode

    def encode(mel: torch.Tensor, valid_frames: int) -> torch.Tensor:
        heard.append(valid_frames)
        return original(mel, valid_frames)

    monkeypatch.setattr(encoder, "encode", encode)
    answered(engine, turn(FIRST, ANSWER, SECOND))
    assert heard == [200]  # the second sound: 2 s


def lengths_of_mels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In samples, of each that is computed from now on."""
    made: list[int] = []
    original = features.log_mel

    def log_mel(samples: Samples, *args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(len(samples))
        return original(samples, *args, **kwargs)

    monkeypatch.setattr(features, "log_mel", log_mel)
    return made


def test_features_are_made_of_what_was_not_heard_before(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, made = conversations(), lengths_of_mels(monkeypatch)
    answered(engine, turn(FIRST))
    long_before = made.copy()
    caller = Caller(engine, turn(FIRST, ANSWER, SECOND))
    assert (long_before, made) == ([16_000], [16_000, 32_000])  # before the engine's thread has it
    run(engine)
    assert made == [16_000, 32_000]
    assert caller.ids == answered(conversations(), turn(FIRST, ANSWER, SECOND)).ids


def test_what_is_forgotten_while_a_turn_waits_is_heard_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = conversations()
    answered(engine, turn(FIRST))
    made = lengths_of_mels(monkeypatch)
    caller = Caller(engine, turn(FIRST, ANSWER, SECOND))
    engine.runner.prefixes = PrefixCache(engine.runner.llm_cache)
    run(engine)
    assert (caller.session.reused, made) == (0, [32_000, 16_000])
    assert caller.ids == answered(conversations(), turn(FIRST, ANSWER, SECOND)).ids


@pytest.mark.parametrize("mode", [{}, {"speech": False}, {"script": "I was there, and so on."}])
@pytest.mark.parametrize("heard", ["", "I was", "I was there, \u00e9"])
def test_a_conversation_goes_on_from_a_reply_that_was_cut(mode: dict[str, Any], heard: str) -> None:
    """All before the reply is reused; of the reply only what was heard is in the history."""
    engine = conversations()
    cut = Caller(engine, dataclasses.replace(turn(FIRST), **mode))
    while len(cut.ids[0]) < 5:
        engine.step()
    cut.session.cancelled = True
    engine.step()
    assert engine.idle
    history = (FIRST, Message("assistant", (Text(heard),)), SECOND)
    again = answered(engine, turn(*history))
    assert again.ids == answered(conversations(), turn(*history)).ids
    done = again.events[-1]
    assert isinstance(done, Done)
    assert done.cached_tokens == cut.session.prompt_length - THOUGHT


def test_of_a_conversation_only_the_last_reply_and_what_followed_it_is_read() -> None:
    """The text of the last reply is read again, since its turn began otherwise when it was made:
    with an empty thought and the start of speech. All before it is not."""
    engine, history, read = conversations(), [FIRST], 0
    for question_text in ("And then?", "Why?", "Indeed?"):
        done = answered(engine, turn(*history)).events[-1]
        assert isinstance(done, Done)
        assert done.cached_tokens == read
        read = done.prompt_tokens - THOUGHT
        history += [ANSWER, Message("user", (Text(question_text),))]


def test_another_sound_of_the_same_length_is_not_taken_for_the_same() -> None:
    other = Message("user", (Text("Listen: "), sound(0.15)))
    engine = conversations()
    answered(engine, turn(FIRST))
    again = answered(engine, turn(other))
    assert again.ids == answered(conversations(), turn(other)).ids
    text_before = answered(conversations(), turn(FIRST)).session.prompt.index(-200)
    assert again.session.reused == text_before


def test_the_same_question_again_gives_the_same_reply() -> None:
    engine = conversations()
    first, second = (answered(engine, turn(FIRST)) for _ in range(2))
    assert second.session.reused == second.session.prompt_length - 1
    assert first.ids == second.ids


def test_compatible_mode_and_the_setting_turn_it_off() -> None:
    for engine in (conversations(compatible=True), conversations(reuse_prefixes=False)):
        answered(engine, turn(FIRST))
        assert engine.runner.prefixes.kept_tokens == 0
        assert answered(engine, turn(FIRST)).session.reused == 0


def test_what_a_failed_reply_has_read_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = conversations()
    caller = Caller(engine, turn(FIRST))
    monkeypatch.setattr(caller.session.text_stream, "push", lambda ids: 1 / 0)
    run(engine)
    assert isinstance(caller.events[-1], ZeroDivisionError)
    assert engine.runner.prefixes.kept_tokens == 0


def test_what_was_kept_makes_room_for_what_comes() -> None:
    engine = conversations(kv_tokens=300, context_length=256)
    for i in range(12):
        answered(engine, turn(Message("user", (Text(f"{i} hello"), sound(0.1 + i / 100)))))
    kept = engine.runner.prefixes.kept_tokens
    assert 0 < kept <= 300
    assert kept + engine.runner.llm_cache.free_tokens == 300


def test_the_oldest_goes_first() -> None:
    cache = KVCache(1, 10, 1, 1, dtype=torch.float32, device=torch.device("cpu"))
    prefixes = PrefixCache(cache)
    for key in ([1, 2, 3, 4, 5, 6], [5, 6, 7, 8]):
        row = prefixes.take(key, len(key))
        assert row is not None
        row.length = len(key)
        prefixes.keep(key, row)
    row = prefixes.take([5, 6, 7, 8, 9], 5)
    assert row is not None and row.length == 4
    assert prefixes.kept_tokens == 4


def kept(*keys: list[int], tokens: int) -> PrefixCache:
    prefixes = PrefixCache(
        KVCache(1, tokens, 1, 1, dtype=torch.float32, device=torch.device("cpu"))
    )
    for key in keys:
        row = prefixes.take(key, len(key))
        assert row is not None
        row.length = len(key)
        prefixes.keep(key, row)
    return prefixes


def test_a_longer_turn_takes_the_place_of_the_one_it_continues() -> None:
    assert kept([1, 2], [1, 2, 3, 4], [1, 2, 3], tokens=20).kept_tokens == 4


def test_what_was_used_last_is_the_last_to_go() -> None:
    prefixes = kept([1, 2, 3, 4], [5, 6, 7, 8], tokens=8)
    assert prefixes.take([1, 2, 3, 4, 9], 4) is not None  # makes room by letting 5, 6, 7, 8 go
    assert prefixes._longest([1, 2, 3, 4])[1] == 4


def test_room_that_cannot_be_made_costs_nothing() -> None:
    prefixes = kept([1, 2, 3, 4], [5, 6, 7, 8], tokens=8)
    assert prefixes.take([9] * 9, 9) is None
    assert prefixes.kept_tokens == 8


def test_a_copied_prefix_holds_the_same_keys() -> None:
    cache = KVCache(2, 20, 1, 3, dtype=torch.float32, device=torch.device("cpu"))
    cache.keys.normal_()
    cache.values.normal_()
    source, target = cache.allocate(8), cache.allocate(9)
    assert source is not None and target is not None
    cache.copy(source, target, 8)
    assert torch.equal(cache.keys[:, 8:16], cache.keys[:, :8])
    assert torch.equal(cache.values[:, 8:16], cache.values[:, :8])
    assert target.length == 8
