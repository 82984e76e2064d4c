"""Compares the language models with the original: states, logits, and every chosen id.

The ids come from the serving code itself: interleaver, runner, KV cache, in compatible mode.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from omnispeech.engine.events import Message, Text, TurnRequest
from omnispeech.engine.interleave import Rules
from omnispeech.engine.runner import LanguageModels, Runner
from omnispeech.engine.sampling import Sampler
from omnispeech.engine.scheduler import LLMTurn
from omnispeech.engine.session import Session
from omnispeech.errors import CheckpointError
from omnispeech.parity.cases import Case, distance
from omnispeech.parity.report import Row

TOLERANCE = 2e-4
UNUSED = TurnRequest(messages=(Message("user", (Text("the prompt is given as vectors"),)),))
NEEDED = {"text_ids", "unit_ids"}
PROMPT_ALONE: dict[str, Any] = {"prompt": {"params": {"text_max": 1, "unit_max": 0}}}


@dataclass(slots=True)
class Trace:
    """What went through the models while one reply was made."""

    llm_calls: list[Tensor] = field(default_factory=list)  # [T, H] each
    speech_calls: list[Tensor] = field(default_factory=list)  # [T, D] each
    states: list[Tensor] = field(default_factory=list)  # [1, H], that chose a token
    conditions: list[Tensor] = field(default_factory=list)  # [1, D]
    text_logits: list[Tensor] = field(default_factory=list)  # [1, V]
    unit_logits: list[Tensor] = field(default_factory=list)  # [1, V']


@torch.inference_mode()
def compare_generations(
    case: Case, models: LanguageModels, prompt: Tensor, ids: list[int]
) -> Iterator[Row]:
    """prompt: [L, H], the spliced vectors of `ids`."""
    known: set[str] = set()
    generations = case.facts.get("generations") or {}
    for name, facts in (generations or PROMPT_ALONE).items():
        session, trace = generate(models, prompt, ids, facts["params"])
        if generations:
            ours = reply_facts(models, session, trace)
            yield from _compare_facts(f"{case.name}/{name}", facts, ours)
        for key, actual in _tensors(name, trace).items():
            if key in case.tensors.keys() - known:
                known.add(key)
                expected = case.tensors[key]
                if key.endswith("tts_logits"):  # their beginning may be all that is stored
                    actual = actual[: max(1, len(expected))]
                yield Row(case.name, key, distance(actual, expected), TOLERANCE)
    for key in sorted(set(filter(is_generation, case.tensors)) - known):
        yield Row(case.name, f"{key} (unknown)", float("inf"), 0.0)


def is_generation(key: str) -> bool:
    return key in ("prompt_hidden", "first_logits") or key.startswith("gen.")


def _tensors(name: str, trace: Trace) -> dict[str, Tensor]:
    found = {
        "prompt_hidden": trace.llm_calls[0],
        "first_logits": trace.text_logits[0][0],
        f"gen.{name}.llm_hidden_for_tts": torch.cat(trace.states),
        f"gen.{name}.tts_cond": torch.cat(trace.conditions),
        f"gen.{name}.llm_logits": torch.cat(trace.text_logits),
    }
    if trace.unit_logits:
        found[f"gen.{name}.tts_logits"] = torch.cat(trace.unit_logits)
    if name == "limits":  # the reply that runs to both limits stands for the logits of all
        found |= {
            f"gen.{kind}": found[f"gen.{name}.{kind}"] for kind in ("llm_logits", "tts_logits")
        }
    return found


def reply_facts(models: LanguageModels, session: Session, trace: Trace) -> dict[str, Any]:
    turn = session.interleaver
    return {
        "text_ids": turn.text_ids,
        "unit_ids": turn.unit_ids,
        "units": [models.units.to_unit(i) for i in turn.unit_ids],
        "text": models.prompt.decode_text(turn.text_ids),
        "n_llm_forwards": len(trace.llm_calls),
        "n_tts_forwards": len(trace.speech_calls),
        "tts_forward_lengths": [len(call) for call in trace.speech_calls],
    }


def _compare_facts(case: str, expected: dict[str, Any], actual: dict[str, Any]) -> Iterator[Row]:
    """Other keys are facts about the original alone."""
    for name in sorted(actual.keys() & expected.keys() | NEEDED):
        equal = name in expected and actual[name] == expected[name]
        yield Row(case, name, 0.0 if equal else float("inf"), 0.0)


def generate(
    models: LanguageModels, prompt: Tensor, ids: list[int], params: dict[str, Any]
) -> tuple[Session, Trace]:
    """Greedy for both language models, by the original's rules; `params` as in the golden files."""
    span = models.lm.config
    speech_end = _ids(params.get("tts_eos"), models.speech_end)
    rules = Rules(
        read=span.text_span,
        write=span.unit_span,
        text_limit=_limit(params, "text_max"),
        unit_limit=_limit(params, "unit_max"),
        text_end=_ids(params.get("eos"), models.text_end),
        speech_end=speech_end,
        compatible=True,
    )
    session = Session(
        request=UNUSED,
        rules=rules,
        prompt=ids,
        features=[],
        valid_frames=[],
        audio_lengths=[],
        key=list(range(len(prompt))),
        text_sampler=Sampler(temperature=0.0),
        speech_sampler=Sampler(temperature=0.0),
        text_stream=models.prompt.text_stream(),
        unit_audio_s=0.0,
        seed=0,
        emit=_raise_errors,
        created_s=0.0,
    )
    tokens = len(prompt) + rules.text_limit + rules.most_units + 1
    runner = Runner(replace(models, speech_end=speech_end), tokens)
    assert runner.enter(session)
    session.prompt_vectors = prompt
    with recorded(models) as trace:
        runner.run_llm([LLMTurn(session, len(prompt))])
        while not session.interleaver.done:
            if session.interleaver.wants_text:
                runner.run_llm([LLMTurn(session)])
            else:
                runner.run_speech([session])
    return session, trace


def _ids(given: int | list[int] | None, otherwise: frozenset[int]) -> frozenset[int]:
    if given is None:
        return otherwise
    return frozenset([given] if isinstance(given, int) else given)


def _limit(params: dict[str, Any], name: str) -> int:
    if not isinstance(params.get(name), int):
        raise CheckpointError(
            f"{name}={params.get(name)!r} of a golden generation; needed: a number"
        )
    return params[name]


@contextmanager
def recorded(models: LanguageModels) -> Iterator[Trace]:
    """Collects what the models compute inside the block, through hooks."""
    trace, lm = Trace(), models.lm
    hooks = [
        _on_output(lm.llm_model.model, trace.llm_calls),
        _on_output(lm.tts_lm_model.model, trace.speech_calls),
        _on_output(lm.llm_model.lm_head, trace.text_logits),
        _on_output(lm.tts_lm_model.lm_head, trace.unit_logits),
        _on_output(lm.llm_ln, trace.conditions),
        lm.llm_model.lm_head.register_forward_pre_hook(
            lambda _, args: trace.states.append(args[0])
        ),
    ]
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def _on_output(module: nn.Module, into: list[Tensor]) -> RemovableHandle:
    return module.register_forward_hook(lambda _module, _args, output: into.append(output))


def _raise_errors(event: object) -> None:
    if isinstance(event, Exception):
        raise event
