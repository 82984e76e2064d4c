"""What `bench.py accuracy` measures with, on the small model; its figures are no test."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import variants
from benchmarks.forced import Reply, compared, logits_at, reply_of, speech_inputs
from benchmarks.spoken import Question, answer, requests
from benchmarks.tables import accuracy_table
from benchmarks.variants import QUANTIZED, VARIANTS, Variant, language_bytes, load, make
from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.checkpoint.models_directory import DECODER, OPENS2S
from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import Message, Text, TurnRequest
from omnispeech.engine.interleave import Rules
from omnispeech.engine.runner import LanguageModels, Models
from omnispeech.models.speech_decoder import SpeechDecoder
from omnispeech.quantize_cli.commands import quantize_llm_awq
from training.domain import Domain, Turn

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "omnispeech" / "small"
LARGEST_KL = 1e-4  # nats per position
RULES = Rules(
    read=4,
    write=8,
    text_limit=64,
    unit_limit=64,
    text_end=frozenset({9}),
    speech_end=frozenset({99}),
)


@pytest.fixture(scope="module")
def engine() -> Conversations:
    return engine_of(load(Variant(), SMALL), load_decoder(SMALL / DECODER, convert=False))


def engine_of(language: LanguageModels, decoder: SpeechDecoder) -> Conversations:
    config = EngineConfig(reuse_prefixes=False)
    return Conversations(Models(language, decoder), config, DecoderConfig())


@pytest.fixture(scope="module")
def reply(engine: Conversations) -> Reply:
    """To something that is heard, whatever it is."""
    noise = np.random.default_rng(0).normal(0, 0.05, 16_000).astype(np.float32)
    (session,) = answer(engine, requests([Question(noise, "")], greedy=True))
    return reply_of(session)


def test_a_model_would_have_said_each_place_of_its_own_greedy_reply(engine, reply) -> None:
    forced = logits_at(engine, reply)
    assert forced.text.argmax(-1).tolist() == list(reply.text_ids)
    units = engine.models.units
    ids = [*range(units.units_bias, units.units_bias + units.count)]
    ids += sorted(engine.models.speech_end)
    assert [ids[i] for i in forced.units.argmax(-1)] == list(reply.unit_ids)


def test_another_model_is_away_from_it_by_both_parts(engine, reply) -> None:
    exact = logits_at(engine, reply)
    assert compared([exact], [exact])["units"].kl == 0
    head = engine.models.lm.llm_model.model.norm.weight
    kept = head.clone()
    head.mul_(0.5)
    try:
        found = compared([exact], [logits_at(engine, reply)])
    finally:
        head.copy_(kept)
    assert found["text"].tokens == len(reply.text_ids)
    assert found["units"].tokens == len(reply.unit_ids)
    assert found["text"].kl > 0
    assert all(np.isfinite(part.kl) for part in found.values())


def test_units_are_led_by_states_in_the_order_of_the_engine() -> None:
    inputs = speech_inputs(RULES, [1, 2, 3, 4, 5, 9], [*range(20, 37), 99])
    assert [len(given.states) for given, _ in inputs] == [4, *[0] * 7, 2, *[0] * 7, 0, 0]
    assert [given.lead for given, _ in inputs] == [None, *range(20, 37)]
    assert [may_end for _, may_end in inputs] == [False] * 8 + [True] * 10


def test_every_row_takes_what_its_commands_make() -> None:
    for variant in VARIANTS.values():
        commands = QUANTIZED[variant.directory]
        speech = [command for command in commands if "speech_lm" in command]
        assert bool(speech) >= (variant.speech_lm == "awq")
        assert len(commands) > len(speech) or variant.llm == "bf16"


def test_a_variant_that_failed_is_not_there(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise SystemExit("bench.py: failed")

    monkeypatch.setattr(variants, "_run", fail)
    with pytest.raises(SystemExit, match="failed"):
        make(QUANTIZED["awq"], SMALL, tmp_path / "awq", lambda: tmp_path)
    assert not (tmp_path / "awq").exists()


def test_commands_are_given_the_questions_where_they_ask_for_them(tmp_path, monkeypatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(variants, "_run", lambda command, _: given.append(command))
    make(QUANTIZED["awq"], SMALL, tmp_path / "x", lambda: Path("asked"))
    assert [command[-2:] for command in given] == [["--calib", "asked"]] * 2
    assert (tmp_path / "x" / "OpenS2S" / "config.json").is_file()


def test_language_models_are_counted_with_head_and_embedding() -> None:
    lm = load(Variant(), SMALL).lm
    parts = (lm.llm_model, lm.tts_lm_model)
    assert language_bytes(Variant(), SMALL) == 2 * sum(
        parameter.numel() for part in parts for parameter in part.parameters()
    )


def test_the_table_shows_sampled_and_greedy_beside_each_other() -> None:
    heard = {"accuracy": 0.99, "exact": 0.9}
    way = {"text_right": 0.95, "heard": heard}
    divergence = {"text": {"kl": 0.25}, "units": {"kl": 0.125}}
    row = {"bytes": 2_500_000, "divergence": divergence, "sampled": way, "greedy": way}
    ceiling, shown = accuracy_table({"ceiling": {"heard": heard}, "one": row}).splitlines()[2:]
    assert ceiling.endswith("| 0.990 | 0.900 |")
    assert "| 2.50 MB | 2.5e-01 | 1.2e-01 | 0.950 / 0.950 | 0.990 / 0.990 |" in shown


def test_both_language_models_in_4_bits_say_the_same(tmp_path: Path, engine) -> None:
    """Random weights could not tell: of those every answer is as good as another."""
    for name in (OPENS2S, DECODER):
        shutil.copytree(SMALL / name, tmp_path / name)
    rng, domain = random.Random(1), Domain()
    turns = [domain.draw(rng).turns[0] for _ in range(40)]
    calibration = tmp_path / "calibration.jsonl"
    calibration.write_text("\n".join(map(_conversation, turns[:30])), encoding="utf-8")
    flags = ["--models", str(tmp_path), "--calib", str(calibration), "--device", "cpu"]
    assert quantize_llm_awq(flags) == 0
    assert quantize_llm_awq([*flags, "--part", "speech_lm"]) == 0
    quantized = engine_of(load(VARIANTS["both, AWQ"], tmp_path), engine.speech_decoder)
    asked = [_typed(turn) for turn in turns[30:]]
    sessions = answer(engine, asked)
    for exact, other in zip(sessions, answer(quantized, asked), strict=True):
        assert exact.interleaver.text_ids == other.interleaver.text_ids
        assert exact.interleaver.unit_ids == other.interleaver.unit_ids
    given = [reply_of(session) for session in sessions]
    found = compared(*([logits_at(one, reply) for reply in given] for one in (engine, quantized)))
    assert 0 < found["text"].kl < LARGEST_KL
    assert 0 < found["units"].kl < LARGEST_KL


def _conversation(turn: Turn) -> str:
    said = [("user", turn.question), ("assistant", turn.answer)]
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in said]})


def _typed(turn: Turn) -> TurnRequest:
    message = Message("user", (Text(turn.question),))
    return TurnRequest(
        messages=(message,), max_new_tokens=64, temperature=0.0, speech_temperature=0.0, seed=0
    )
