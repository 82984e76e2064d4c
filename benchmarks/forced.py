"""What a model would have said at each place of a reply that another one gave: both language models
in one call each, over the whole reply."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.divergence import Divergence, divergence
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import TurnRequest
from omnispeech.engine.interleave import Interleaver, Rules, SpeechInput
from omnispeech.engine.runner import LanguageModels
from omnispeech.engine.session import Session
from omnispeech.models.qwen3 import CausalLM

NEVER = -1e4  # a logit: nothing is left of it, and differences to it stay finite


@dataclass(frozen=True, slots=True)
class Reply:
    """What was asked, and every id that was written for it."""

    request: TurnRequest
    rules: Rules
    text_ids: tuple[int, ...]
    unit_ids: tuple[int, ...]  # of the speech vocabulary


def reply_of(session: Session) -> Reply:
    """Of one that has been answered."""
    written = session.interleaver
    return Reply(session.request, session.rules, tuple(written.text_ids), tuple(written.unit_ids))


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    text: Tensor  # [T, V]
    units: Tensor  # [U, number of units and end ids]; NEVER where an end was not allowed


@torch.inference_mode()
def logits_at(engine: Conversations, reply: Reply) -> Logits:
    lm = engine.models.lm
    prompt = _heard(engine, reply.request)  # [L, H]
    written = lm.llm_model.embed(torch.tensor(reply.text_ids[:-1], dtype=torch.long))
    states = _read(lm.llm_model, torch.cat([prompt, written]))[len(prompt) - 1 :]  # [T, H]
    spoken = _spoken(engine.models, reply, lm.speech_condition(states))
    return Logits(lm.llm_model.lm_head(states), spoken)


def _heard(engine: Conversations, request: TurnRequest) -> Tensor:
    """[L, H] the prompt with the sound in it"""
    session = engine.open(request, lambda _: None)
    assert engine.runner.enter(session), "there is room for one reply"
    try:
        while session.prompt_vectors is None:
            engine.runner.listen(session)
        return session.prompt_vectors
    finally:
        engine.runner.leave(session)


def _read(lm: CausalLM, vectors: Tensor) -> Tensor:
    """[T, D] -> [T, D], from an empty cache"""
    cache = lm.new_cache(len(vectors))
    row = cache.allocate(len(vectors))
    assert row is not None, len(vectors)
    return lm(vectors, cache, cache.layout([(row, len(vectors))]))


def _spoken(models: LanguageModels, reply: Reply, conditions: Tensor) -> Tensor:
    """[T, D] -> logits [U, N]"""
    speech = models.lm.tts_lm_model
    pieces, ends_allowed = [], []
    for given, may_end in speech_inputs(reply.rules, reply.text_ids, reply.unit_ids):
        lead = speech.speaker()[None] if given.lead is None else _embed(speech, given.lead)
        pieces.append(torch.cat([lead, conditions[given.states.start : given.states.stop]]))
        ends_allowed.append(may_end)
    last = torch.tensor([len(piece) for piece in pieces]).cumsum(0) - 1
    states = _read(speech, torch.cat(pieces))[last]  # [U, D]
    return _choosable(models, speech.lm_head(states), torch.tensor(ends_allowed))


def _embed(lm: CausalLM, token: int) -> Tensor:
    return lm.embed(torch.tensor([token]))


def _choosable(models: LanguageModels, logits: Tensor, may_end: Tensor) -> Tensor:
    """[U, V], [U] bool -> [U, N]: units, and ends where they are allowed"""
    bias, count = models.units.units_bias, models.units.count
    ends = logits[:, sorted(models.speech_end)].masked_fill(~may_end[:, None], NEVER)
    return torch.cat([logits[:, bias : bias + count], ends], dim=1)


def speech_inputs(
    rules: Rules, text_ids: Sequence[int], unit_ids: Sequence[int]
) -> list[tuple[SpeechInput, bool]]:
    """What the speech LM reads before each unit of a reply, and whether it may end there."""
    again = Interleaver(rules)
    for token in text_ids:
        again.add_text(token)
    inputs = []
    for unit in unit_ids:
        given = again.next_input()
        assert given is not None, "the reply went on"
        inputs.append((given, again.choice == "units_or_end"))
        again.add_unit(unit)
    return inputs


def compared(exact: Sequence[Logits], other: Sequence[Logits]) -> dict[str, Divergence]:
    """Of text and of units, over all positions of all replies."""
    return {part: _compared(exact, other, part) for part in ("text", "units")}


def _compared(exact: Sequence[Logits], other: Sequence[Logits], part: str) -> Divergence:
    before, after = (torch.cat([getattr(x, part) for x in side])[None] for side in (exact, other))
    chosen = before.argmax(-1)  # [1, N]; a greedy reply holds just these
    return divergence(before, after, chosen, torch.ones_like(chosen, dtype=torch.bool))
