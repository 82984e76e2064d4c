"""The report counts what was answered and heard, and says plainly what is not met."""

import json
import shutil

import numpy as np
import pytest
import torch

from training.answers import UNIT_SAMPLES, VOICE, Lexicon
from training.asking import Reply
from training.domain import DO_NOT_KNOW, SPOKEN, Turn, words_of
from training.judge import ANY_WORDS, Judge, Score
from training.listening import Samples
from training.questions import Question, Said, asked, spoken, talk, wav
from training.recordings import HEARD_HZ, Clip, Recordings
from training.report import CEILING, Heard, Reporter, Row, bounds, mean, table
from training.report import SPOKEN as SPOKEN_QUESTIONS
from training.voices import RATE_HZ, speak

FORMS = [word + end for word in SPOKEN for end in ("", ".")]
SUM = "Three plus four is seven."


class Reader(Judge):
    """Knows the sounds of `lexicon`."""

    def __init__(self) -> None:
        pass

    def hear(self, samples: Samples, rate_hz: int, expected: str = "") -> list[str]:
        numbers = [round(float(x) * 1000) for x in samples[::UNIT_SAMPLES]]
        return [FORMS[n - 1].rstrip(".") for n in numbers if n]


@pytest.fixture(scope="module")
def reporter() -> Reporter:
    sounds = {
        form: np.full(UNIT_SAMPLES, number / 1000, np.float32)
        for number, form in enumerate(FORMS, 1)
    }
    return Reporter(Lexicon(sounds, {}, 0, torch.empty(0)), Reader())


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Recordings:
    """Two questions of one voice, the second a follow-up, and one of another"""
    work = tmp_path_factory.mktemp("held")
    np.arange(3000, dtype=np.int16).tofile(work / "held.pcm")
    talks = [
        [said("what is three plus four", SUM, 0, "m8"), said("and plus two", "Nine.", 1, "m8")],
        [said("say apple", "Apple.", 2, "f4")],
    ]
    (work / "held.json").write_text(json.dumps(talks))
    return Recordings(work, "held")


def said(question: str, answer: str, number: int, voice: str) -> list[object]:
    return [[question, answer], [1000 * number, 1000, question, voice]]


def heard(reporter: Reporter, wanted: str, text: str, spoken: str) -> Heard:
    sound = reporter.recording(spoken) if spoken else np.zeros(0, np.float32)
    reply = Reply(text, sound, RATE_HZ, len(sound) / RATE_HZ / 4)
    question = Question(f"q {wanted}", wanted, lambda address, seed: reply)
    return reporter.ask("", [question], "")[0]


def test_texts_and_what_is_heard_of_them_are_counted_apart(reporter: Reporter) -> None:
    row = reporter.row(
        [
            heard(reporter, SUM, SUM, SUM),
            heard(reporter, SUM, "Apple.", "Apple."),
            heard(reporter, SUM, SUM, "Three plus four is six."),
            heard(reporter, "Apple.", "Apple.", ""),
        ]
    )
    assert row.text_right == 0.75
    assert row.own == Score(1 - 2 / 12, 0.5, 4)
    assert row.right_heard == 0.25
    assert row.real_time == pytest.approx(0.25)
    assert row.wrong == [(f"q {SUM}", "Apple.")]
    assert row.misheard == [
        ("three plus four is seven", "three plus four is six"),
        ("apple", ""),
    ]


def test_pauses_are_measured_only_where_the_recording_says_where_they_are(
    reporter: Reporter,
) -> None:
    right = heard(reporter, "Apple.", "Apple.", "Apple.")
    hiss = np.random.default_rng(1).normal(0, 1e-3, len(right.reply.samples))
    noisy = Reply("Apple.", (right.reply.samples + hiss).astype(np.float32), RATE_HZ, 1.0)
    level = reporter.pauses_db(Heard(right.question, noisy, []))
    assert level is not None
    assert level == pytest.approx(20 * np.log10(1e-3 / right.reply.samples.max()), abs=1)
    resampled = Reply("Apple.", noisy.samples, 24_000, 1.0)
    assert reporter.pauses_db(Heard(right.question, resampled, [])) is None
    assert reporter.pauses_db(heard(reporter, SUM, "Apple.", "Apple.")) is None
    assert reporter.pauses_db(heard(reporter, SUM, "Three plus four is six.", SUM)) is None
    assert mean([None, -30.0, -40.0]) == -35 and mean([None]) is None


def row(**figures: float) -> Row:
    defaults = {"text_right": 0.95, "right_heard": 0.85, "real_time": 0.5, "pauses_db": -30.0}
    accuracy = figures.pop("accuracy", 0.97)
    return Row(Score(accuracy, 0.9, 200), **(defaults | figures))


@pytest.mark.parametrize(
    "worse",
    [
        {"text_right": 0.94},
        {"accuracy": 0.96},
        {"right_heard": 0.84},
        {"real_time": 0.51},
        {"pauses_db": -29.0},
    ],
)
def test_each_bound_is_met_at_its_figure_and_not_below(worse: dict[str, float]) -> None:
    ceiling = Row(Score(1.0, 1.0, 200))
    found = bounds({CEILING: ceiling, SPOKEN_QUESTIONS: row()}, 15_000_000)
    assert all(bound.met for bound in found)
    found = bounds({CEILING: ceiling, SPOKEN_QUESTIONS: row(**worse)}, 15_000_001)
    assert [bound.met for bound in found].count(False) == 2
    assert not found[-1].met and "not met" in found[-1].cells()


def test_a_table_has_a_line_for_each_row_and_gaps_where_nothing_is_known() -> None:
    rows = {"spoken": row().cells(), "recordings": Row(Score(1.0, 0.5, 7)).cells()}
    lines = table(("a", "b", "c", "d", "e", "f", "of"), rows).splitlines()
    assert lines[2].split() == ["spoken", "0.950", "0.970", "0.900", "0.850", "-30", "0.50", "200"]
    assert lines[3].split() == ["recordings", "1.000", "0.500", "7"]
    assert len({len(line) for line in lines[1:]}) == 1


def test_a_follow_up_is_asked_behind_the_right_answer(held: Recordings) -> None:
    dialogue: list[Said] = held.dialogues[0]
    question = talk(held, dialogue, "Be kind.")
    messages = question.send.args[0]  # type: ignore[attr-defined]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"] == SUM
    assert messages[-1]["content"][0]["type"] == "input_audio"
    assert question.wanted == "Nine." and SUM in question.told


def test_a_question_is_sent_whole_with_silence_around_it(held: Recordings) -> None:
    sound = wav(held, held.dialogues[0][0][1])
    assert len(sound) == 44 + 2 * (1000 + int(0.4 * HEARD_HZ))
    assert [q.wanted for q in spoken(held, 2)] == [SUM, "Apple."]
    assert "m8" in spoken(held, 1)[0].told


def test_questions_are_told_apart_by_what_is_asked() -> None:
    turns = [
        Turn("how much is two minus one", "Two minus one is one."),
        Turn("say apple", "Apple."),
        Turn("what is nineteen times two", DO_NOT_KNOW),
    ]
    clip = Clip(0, 0, "", "m8")
    kinds = [asked([(turn, clip)], lambda address, seed: None).kind for turn in turns]  # type: ignore
    assert kinds == ["sums", "repetitions", "unknown"]


def test_a_text_of_several_sentences_is_one_row_of_words() -> None:
    assert words_of("Apple, tiger. Seven!") == ["apple", "tiger", "seven"]


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_the_judge_hears_any_words_only_if_told_so() -> None:
    pytest.importorskip("pocketsphinx")
    judge = Judge()
    assert judge.hear(speak("three plus four is seven.", VOICE), RATE_HZ) == words_of(SUM)
    mixed = speak("seven tiger plus.", VOICE)
    assert judge.hear(mixed, RATE_HZ, ANY_WORDS) == ["seven", "tiger", "plus"]
    assert judge.hear(mixed, RATE_HZ) != ["seven", "tiger", "plus"]
    assert judge.hear(mixed[:0], RATE_HZ) == []
