"""What each model is given to compute, counted at its door (defects A, B8 to B10, C4, D2 to D5)."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_models import GOLDEN, Caller, conversations, golden_models, question, run
from torch import Tensor, nn

from omnispeech.config import DecoderConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import Audio, Done, Message
from omnispeech.models.omnispeech import OmniSpeech, OmniSpeechConfig

SPEECH_LENGTHS = [3, 1, 1, 1] * 5 + [3] + [1] * 7  # 12 text tokens at 2:4, then 8 units


@contextmanager
def watched(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(input, output) of each call."""
    calls: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    try:
        yield calls
    finally:
        handle.remove()


def quick(**changes: Any) -> Conversations:
    """8 units at most after the text, and little work on their sound."""
    changes = {"unit_limit": 8, **changes}
    return conversations(DecoderConfig(euler_steps=1, first_block=10), **changes)


def lengths(calls: list[tuple[Tensor, Tensor]]) -> list[int]:
    return [len(given) for given, _ in calls]


def test_every_position_is_read_once_and_the_last_token_never() -> None:
    """As the original, which neither reads a prompt again nor its last token at all."""
    engine = quick()
    lm = engine.models.lm
    caller = Caller(engine, question())
    with watched(lm.llm_model) as llm, watched(lm.tts_lm_model) as speech:
        run(engine)
    assert lengths(llm) == [caller.session.prompt_length] + [1] * (len(caller.ids[0]) - 1)
    assert lengths(speech) == SPEECH_LENGTHS


def test_the_speech_starts_from_the_state_that_chose_the_first_word() -> None:
    """As in training: the state at the start-of-speech token, which ends the prompt."""
    engine = quick()
    lm = engine.models.lm
    Caller(engine, question())
    with watched(lm.llm_model) as llm, watched(lm.tts_lm_model) as speech:
        run(engine)
    first = lm.speech_condition(llm[0][1][-1:])[0]
    torch.testing.assert_close(speech[0][0][1], first)


def test_the_speech_lm_reads_the_speaker_vector_first() -> None:
    """Defect B8: nobody can choose a voice, so it is that of no speaker, as the original's."""
    engine = quick()
    speech_lm = engine.models.lm.tts_lm_model
    Caller(engine, question())
    with watched(speech_lm) as speech:
        run(engine)
    torch.testing.assert_close(speech[0][0][0], speech_lm.speaker(torch.zeros(512)))


def test_a_speaker_embedding_that_is_given_is_heard() -> None:
    """Defect B8: the original has the parameter and reads another."""
    lm, voice = golden_models().language.lm.tts_lm_model, torch.linspace(-1, 1, 512)
    expected = lm.spk_ln(lm.spk2tts.weight @ voice)
    torch.testing.assert_close(lm.speaker(voice), expected)
    assert (lm.speaker(voice) - lm.speaker()).abs().max() > 1e-2


def test_a_speech_lm_of_the_qwen2_kind_writes_a_whole_reply() -> None:
    """Defect B9: the original's fails on its second token."""
    raw = json.loads((GOLDEN / "opens2s/opens2s-tiny/config.json").read_text())
    raw["tts_lm_config"]["model_type"] = "qwen2"
    torch.manual_seed(0)
    lm = OmniSpeech(OmniSpeechConfig.from_dict(raw)).eval().requires_grad_(False)
    for parameter in lm.parameters():
        nn.init.normal_(parameter, std=0.1)
    engine = quick(lm=lm)
    caller = Caller(engine, question(speech_temperature=0.0))
    run(engine)
    assert isinstance(caller.events[-1], Done) and len(caller.ids[1]) > 20


def first_sound(engine: Conversations, *seconds: float) -> Tensor:
    """[T, H]: what the LLM reads of the first of several sounds of one request."""
    sounds = tuple(question(seconds=s).messages[0].content[1] for s in seconds)
    caller = Caller(engine, replace(question(), messages=(Message("user", sounds),)))
    with watched(engine.models.lm.llm_model) as llm:
        run(engine)
    assert isinstance(sounds[0], Audio)
    start = caller.session.prompt.index(-200)
    return llm[0][0][start : start + caller.session.audio_lengths[0]]


def test_a_sound_is_heard_the_same_beside_a_longer_one() -> None:
    """Defect B10."""
    alone, beside = first_sound(quick(), 1.0), first_sound(quick(), 1.0, 2.5)
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-5)


def test_a_sound_beside_a_longer_one_ends_differently_in_compatible_mode() -> None:
    """Defect B10, reproduced: its last vectors hear the encoded silence."""
    alone, beside = (first_sound(quick(compatible=True), 1.0, *more) for more in ((), (2.5,)))
    torch.testing.assert_close(beside[:-2], alone[:-2], rtol=0, atol=1e-5)
    assert (beside[-1] - alone[-1]).abs().max() > 1e-3


def test_conversations_share_each_call_of_both_language_models() -> None:
    """Defect C4. Replies so short that none is ahead enough to stand back for others."""
    counts = []
    for callers in (1, 8):
        engine = quick()
        lm = engine.models.lm
        for i in range(callers):
            Caller(engine, question(f"Question {i}", max_new_tokens=4))
        with watched(lm.llm_model) as llm, watched(lm.tts_lm_model) as speech:
            run(engine)
        counts.append((len(llm), len(speech)))
    (llm_alone, speech_alone), (llm_together, speech_together) = counts
    assert llm_together <= llm_alone + 8 and speech_together <= speech_alone + 8


def test_nothing_is_embedded_twice() -> None:
    """Defect D2: the original puts the whole sequence together anew for each span."""
    engine = quick()
    lm = engine.models.lm
    caller = Caller(engine, question())
    with (
        watched(lm.llm_model.model.embed_tokens) as words,
        watched(lm.tts_lm_model.model.embed_tokens) as units,
    ):
        run(engine)
    assert lengths(words) == [len(caller.session.prompt)] + [1] * (len(caller.ids[0]) - 1)
    assert lengths(units) == [1] * (len(caller.ids[1]) - 1)


def test_keys_and_values_are_written_in_place() -> None:
    """Defect D2: the original copies the whole cache for each token."""
    engine = quick()
    caches = (engine.runner.llm_cache, engine.runner.speech_cache)
    tensors = [tensor for cache in caches for tensor in (cache.keys, cache.values)]
    before = [tensor.data_ptr() for tensor in tensors]
    caller = Caller(engine, question())
    while not caller.pcm:
        engine.step()
    row = caller.session.llm_row
    assert row is not None
    read = engine.runner.llm_cache.keys[:, row.start : row.start + row.length].clone()
    run(engine)
    after = [tensor for cache in caches for tensor in (cache.keys, cache.values)]
    assert [tensor.data_ptr() for tensor in after] == before
    assert torch.equal(engine.runner.llm_cache.keys[:, row.start : row.start + len(read[0])], read)


def test_of_a_prompt_only_its_last_state_goes_on() -> None:
    """Defects C5, D2: the original keeps the states of all layers at every position."""
    engine = quick()
    lm = engine.models.lm
    caller = Caller(engine, question("word " * 50))
    with watched(lm.llm_model.lm_head) as heads:
        while not caller.ids[0]:
            engine.step()
    assert lengths(heads) == [1]
    assert caller.session.prompt_vectors is None
    assert len(caller.session.conditions) <= 1


def test_the_llm_runs_ahead_of_the_speech() -> None:
    """Defect D3: the original's waits for every span to be spoken."""
    engine = quick(run_ahead=20)
    caller, most = Caller(engine, question(max_new_tokens=40)), 0
    while not engine.idle:
        engine.step()
        most = max(most, caller.session.interleaver.ahead)
    assert 10 < most <= 20


@pytest.mark.parametrize(("compatible", "longest"), [(False, [6000, 3000]), (True, [6000, 6000])])
def test_a_short_sound_is_not_padded_to_a_longer_one(compatible: bool, longest: list[int]) -> None:
    """Defect D4: three segments of 30 s are encoded; the original makes the mel of four."""
    engine = quick(compatible=compatible)
    with watched(engine.models.lm.audio_encoder_model) as encoded:
        sounds = tuple(question(seconds=s).messages[0].content[1] for s in (31.0, 2.0))
        caller = Caller(engine, replace(question(), messages=(Message("user", sounds),)))
        assert [mel().shape[1] for mel in caller.session.features] == longest
        engine.step()
        engine.step()
    assert lengths(encoded) == [2, 1]


def test_speech_logits_are_made_for_units_and_ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect D5, and B5: an id that has no logit can not be chosen."""
    import omnispeech.engine.runner as runner

    engine, original, widths = quick(), runner.choose, set()
    models = engine.models

    def choose(logits: Tensor, samplers: Any) -> list[int]:
        widths.add(logits.shape[1])
        return original(logits, samplers)

    monkeypatch.setattr(runner, "choose", choose)
    Caller(engine, question())
    with watched(models.lm.tts_lm_model.lm_head) as whole:
        run(engine)
    assert whole == []
    words = models.lm.config.llm.vocab_size
    assert widths == {words, models.units.count + len(models.speech_end)}
