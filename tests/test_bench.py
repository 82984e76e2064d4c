"""What the benchmark measures with; its figures are no test."""

import asyncio
import math
import random
import sys
from collections.abc import Coroutine
from typing import Any

import pytest
import torch
from fake_engine import DONE, FakeEngine, serving, sound

import bench
from benchmarks import talks
from benchmarks.corpus import PARTS, part_of, pieces
from benchmarks.divergence import divergence
from benchmarks.questions import Question, first_questions
from benchmarks.sound import Ear, mixture
from benchmarks.tables import ROWS, rows_table
from benchmarks.talkers import Habits, Notes, Speech
from omnispeech.engine.events import TextDelta


@pytest.mark.parametrize(
    ("arguments", "command", "passed"),
    [
        (["--rounds", "1"], "replies", ["--rounds", "1"]),
        ([], "replies", []),
        (["replies", "--rounds", "1"], "replies", ["--rounds", "1"]),
        (["quantize", "--quick"], "quantize", ["--quick"]),
        (["model", "replies"], "model", ["replies"]),
    ],
)
def test_the_first_word_picks_what_is_measured(monkeypatch, arguments, command, passed) -> None:
    called: list[tuple[str, list[str]]] = []
    for name in bench.COMMANDS:
        monkeypatch.setitem(bench.COMMANDS, name, lambda a, name=name: called.append((name, a)))
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    bench.main()
    assert called == [(command, passed)]


def test_divergence_is_that_of_the_textbook() -> None:
    exact = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]]]).log()  # [1, 3, 2]
    other = torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.1, 0.9]]]).log()
    targets = torch.tensor([[1, 0, 0]])
    counted = torch.tensor([[True, True, False]])
    result = divergence(exact, other, targets, counted)
    assert result.tokens == 2
    assert result.kl == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert result.perplexity == pytest.approx(1 / math.sqrt(0.75 * 0.5))
    assert result.perplexity_change == pytest.approx(1 / math.sqrt(0.75 * 0.5) - 2)


def test_no_document_is_in_two_parts() -> None:
    names = [f"package/module_{i}.py" for i in range(1000)]
    found = {part: {n for n in names if part_of(n) == part} for part in ("train", *PARTS)}
    assert sum(len(part) for part in found.values()) == len(names)
    assert all(50 < len(found[part]) < 200 for part in PARTS)


def test_the_same_seed_gives_the_same_text() -> None:
    assert torch.equal(pieces("calibration", 2, 16, 3), pieces("calibration", 2, 16, 3))
    assert not torch.equal(pieces("calibration", 2, 16, 3), pieces("calibration", 2, 16, 4))


def test_a_third_to_two_thirds_of_a_mixture_are_heard_in_the_middle() -> None:
    mixed = mixture("evaluation", 20, 100, 0)
    shares = mixed.sound.float().mean(1)
    assert shares.min() >= 0.28 and shares.max() <= 0.72
    assert not mixed.sound[:, 0].any() and mixed.after[:, -1].all()
    vectors = Ear(8, 0.1).splice(mixed, torch.zeros(20, 100, 8))
    assert torch.equal(vectors.abs().sum(-1) > 0, mixed.sound)


def test_parts_that_were_not_run_are_said_so() -> None:
    assert rows_table({}).count("not run") == len(ROWS)
    shown = rows_table({"resume": {"identical": 3, "kills": 3}})
    assert "3 of 3" in shown


def test_the_questions_have_answers_and_are_short_enough_for_the_small_model() -> None:
    questions = first_questions()
    assert len({question.answer for question in questions}) > 10
    assert all(0.5 < len(question.samples) / 16_000 < 3.9 for question in questions)


PEOPLE = {"realtime, manual": 1, "chat": 2, "speech": 4, "ws/stream": 8}


class Patient(random.Random):
    """Never interrupts, leaves or loses the connection."""

    def random(self) -> float:
        return 0.99


async def one_answer(talk: Coroutine[Any, Any, None], notes: Notes) -> None:
    async with asyncio.timeout(60):
        talking = asyncio.create_task(talk)
        while not notes.right:
            await asyncio.sleep(0.02)
        talking.cancel()
        await asyncio.wait([talking])


@pytest.mark.parametrize("protocol", PEOPLE)
def test_a_wrong_answer_is_noticed_in_every_protocol(protocol: str) -> None:
    question = Question(first_questions()[0].samples, "Twenty.")
    with serving(FakeEngine(TextDelta("Nin"), sound(400), TextDelta("e."), DONE)) as url:
        notes, habits = Notes(), Habits(Patient(), 0.05, [Speech.of(question)])
        asyncio.run(one_answer(talks.person(PEOPLE[protocol], url, notes, habits, math.inf), notes))
    assert notes.right.keys() == {protocol}
    assert set(notes.right[protocol]) == {False}
    assert notes.mistakes[0] == f"{protocol}: 'Nine.', not 'Twenty.'"


@pytest.mark.parametrize(("least", "failures"), [(0.75, 0), (0.8, 1)])
def test_too_many_wrong_answers_fail_the_run(least: float, failures: int) -> None:
    notes = Notes(right={"chat": [True, True], "speech": [True, False]})
    talks.check(notes, 1.0, 1.0, least)
    assert len(notes.wrong) == failures
