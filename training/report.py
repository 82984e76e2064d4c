"""The figures of a trained model, in voices it was not trained on, beside what is asked of it."""

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.quantization.output import write_json
from training import questions
from training.answers import Lexicon
from training.asking import Reply, server
from training.domain import words_of
from training.export import MOST_BYTES, bytes_in
from training.fitting import Clock
from training.judge import ANSWERS, ANY_WORDS, Judge, Score, score
from training.listening import Chain, Samples, pause_level_db
from training.questions import COUNTS, Question
from training.recordings import Recordings
from training.voices import RATE_HZ

logger = logging.getLogger(__name__)

THREADS = 2  # of the server
TELL = 50  # replies
NEAR = 300  # samples: a reply of this much more or less is as long as the recording
CEILING, SPOKEN = "recordings of the answers", "spoken questions"
COLUMNS = ("text right", "words", "sentences", "right heard", "pauses dB", "real time", "of")


@dataclass(frozen=True, slots=True)
class Heard:
    question: Question
    reply: Reply
    words: list[str]  # what the judge heard

    @property
    def text_right(self) -> bool:
        return self.reply.text == self.question.wanted


@dataclass(frozen=True, slots=True)
class Row:
    """None: there is no such figure."""

    own: Score  # what the judge heard against the text that was to be said
    text_right: float | None = None
    right_heard: float | None = None  # what the judge heard is the right answer
    pauses_db: float | None = None
    real_time: float | None = None  # mean over the replies
    wrong: Sequence[tuple[str, str]] = ()  # question, text
    misheard: Sequence[tuple[str, str]] = ()  # text, what the judge heard

    def cells(self) -> list[str]:
        part = [self.text_right, self.own.accuracy, self.own.exact, self.right_heard]
        return [
            *("" if x is None else f"{x:.3f}" for x in part),
            "" if self.pauses_db is None else f"{self.pauses_db:.0f}",
            "" if self.real_time is None else f"{self.real_time:.2f}",
            str(self.own.sentences),
        ]


Rows = dict[str, Row]


@dataclass(frozen=True, slots=True)
class Bound:
    what: str
    figure: float
    bound: float
    met: bool

    def cells(self) -> list[str]:
        return [f"{self.figure:.3f}", f"{self.bound:.3f}", "met" if self.met else "not met"]


def report(work: Path, models: Path, lexicon: Lexicon, held: Recordings, other: Recordings) -> None:
    """Prints the figures and writes them to `report.json`."""
    reporter = Reporter(lexicon, Judge())
    size = bytes_in(models)
    rows = reporter.of_the_decoder(models, held)
    with server(models, THREADS, work / "server.log") as address:
        rows |= reporter.of_the_server(address, held, other)
    found = bounds(rows, size)
    sys.stdout.write(table(COLUMNS, {name: row.cells() for name, row in rows.items()}))
    cells = {bound.what: bound.cells() for bound in found}
    sys.stdout.write(table(("figure", "bound", ""), cells))
    told = {
        "rows": {name: asdict(row) for name, row in rows.items()},
        "bounds": [asdict(bound) for bound in found],
    }
    write_json(work / "report.json", told)


class Reporter:
    def __init__(self, lexicon: Lexicon, judge: Judge) -> None:
        self.lexicon, self.judge = lexicon, judge

    def of_the_decoder(self, models: Path, held: Recordings) -> Rows:
        """What is lost from the recordings of the answers to the flow's sound."""
        chain = Chain(self.lexicon, load_decoder(models / "glm-4-voice-decoder", convert=False))
        asked = [dialogue[0][0].answer for dialogue in held.dialogues[: COUNTS["spoken"]]]
        rows = {}
        for name, way in chain.ways().items():
            logger.info("%s", name)
            rows[name] = self.of_sounds(asked, [way(words_of(text)) for text in asked])
        return rows

    def of_sounds(self, texts: list[str], sounds: list[Samples]) -> Row:
        said = [words_of(text) for text in texts]
        heard = [self.judge.hear(sound, RATE_HZ) for sound in sounds]
        recordings = [self.recording(text) for text in texts]
        return Row(
            score(said, heard),
            pauses_db=mean(map(pause_level_db, sounds, recordings)),
            misheard=misheard(said, heard),
        )

    def of_the_server(self, address: str, held: Recordings, other: Recordings) -> Rows:
        def ask(name: str, asked: list[Question], expected: str = ANSWERS) -> list[Heard]:
            logger.info("%s", name)
            return self.ask(address, asked, expected)

        written = {
            "typed questions": questions.typed(held),
            "typed sums beyond its numbers": questions.sums_beyond(),
        }
        rows = {name: self.row(ask(name, those)) for name, those in written.items()}
        spoken = ask(SPOKEN, questions.spoken(held, COUNTS["spoken"]))
        rows[SPOKEN] = self.row(spoken)
        for kind in ("sums", "repetitions", "unknown"):
            rows[f"  {kind}"] = self.row([h for h in spoken if h.question.kind == kind])
        for name, asked in self.others(held, other).items():
            rows[name] = self.row(ask(name, asked))
        for name, asked in self.texts(held).items():
            rows[f"{name}, recorded"] = self.of_reading([q.wanted for q in asked])
            rows[f"{name}, read aloud"] = self.row(ask(name, asked, ANY_WORDS))
        return rows

    def others(self, held: Recordings, other: Recordings) -> dict[str, list[Question]]:
        return {
            "follow-ups": questions.second_turns(held),
            "third questions of a talk": questions.third_questions(held),
            "under other system prompts": questions.under_other_prompts(held),
            "by another synthesizer": questions.spoken(other, COUNTS["other"]),
        }

    def texts(self, held: Recordings) -> dict[str, list[Question]]:
        return {
            "answers": questions.answers_to_read(held),
            "words in any order": questions.words_to_read(),
        }

    def of_reading(self, texts: list[str]) -> Row:
        said = [words_of(text) for text in texts]
        heard = [self.judge.hear(self.recording(text), RATE_HZ, ANY_WORDS) for text in texts]
        return Row(score(said, heard), misheard=misheard(said, heard))

    def recording(self, text: str) -> Samples:
        return self.lexicon.speech(words_of(text))

    def ask(self, address: str, asked: list[Question], expected: str) -> list[Heard]:
        """One after the other, each with its own seed"""
        replies, clock = [], Clock(0, len(asked))
        for seed, question in enumerate(asked):
            replies.append(question.send(address, seed))
            if len(replies) % TELL == 0:
                logger.info("reply %s", clock.told(len(replies)))
        return [
            Heard(question, reply, self.judge.hear(reply.samples, reply.rate_hz, expected))
            for question, reply in zip(asked, replies, strict=True)
        ]

    def row(self, heard: list[Heard]) -> Row:
        said = [words_of(h.reply.text) for h in heard]
        words = [h.words for h in heard]
        return Row(
            score(said, words),
            text_right=mean(h.text_right for h in heard),
            right_heard=mean(h.words == words_of(h.question.wanted) for h in heard),
            pauses_db=mean(map(self.pauses_db, heard)),
            real_time=mean(h.reply.real_time for h in heard),
            wrong=[(h.question.told, h.reply.text) for h in heard if not h.text_right],
            misheard=misheard(said, words),
        )

    def pauses_db(self, heard: Heard) -> float | None:
        """None where the right answer was not said, or is not at the rate of the recordings."""
        recording, made = self.recording(heard.question.wanted), heard.reply.samples
        alike = heard.reply.rate_hz == RATE_HZ and abs(len(recording) - len(made)) < NEAR
        return pause_level_db(made, recording) if heard.text_right and alike else None


def misheard(said: list[list[str]], heard: list[list[str]]) -> list[tuple[str, str]]:
    pairs = zip(said, heard, strict=True)
    return [(" ".join(a), " ".join(b)) for a, b in pairs if a != b]


def mean(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return fmean(known) if known else None


def bounds(rows: Rows, size: int) -> list[Bound]:
    """What is asked of the model."""
    row, ceiling = rows[SPOKEN], rows[CEILING].own.accuracy
    pauses = -row.pauses_db if row.pauses_db is not None else 0.0
    return [
        at_least("text exactly right", row.text_right or 0.0, 0.95),
        at_least("words heard, of its own text", row.own.accuracy, 0.97 * ceiling),
        at_least("right answer heard", row.right_heard or 0.0, 0.85),
        at_most("real-time factor", row.real_time or float("inf"), 0.5),
        at_least("pauses below speech, dB", pauses, 30.0),
        at_most("size, MB", size / 1e6, MOST_BYTES / 1e6),
    ]


def at_least(what: str, figure: float, bound: float) -> Bound:
    return Bound(f"{what}, at least", figure, bound, figure >= bound)


def at_most(what: str, figure: float, bound: float) -> Bound:
    return Bound(f"{what}, at most", figure, bound, figure <= bound)


def table(columns: Sequence[str], rows: dict[str, list[str]]) -> str:
    first = max(map(len, rows))
    lines = [["", *columns], *([name, *cells] for name, cells in rows.items())]
    return "\n" + "".join(_line(cells, first) for cells in lines)


def _line(cells: list[str], first: int) -> str:
    name, *others = cells
    return (name.ljust(first) + "".join(cell.rjust(13) for cell in others)).rstrip() + "\n"
