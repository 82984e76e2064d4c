"""Spoken questions of examples/, and what the small model ought to answer."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omnispeech.audio.io import decode_audio
from omnispeech.audio.resample import Samples
from omnispeech.small.directory import write_small

EXAMPLES = Path(__file__).parent.parent / "examples"
QUESTION = EXAMPLES / "question.wav"
ANSWER = "Three plus four is seven."
LONGEST_S = 60.0


@dataclass(frozen=True, slots=True)
class Question:
    samples: Samples  # [N] at 16 kHz
    answer: str


def first_questions() -> list[Question]:
    """Of each conversation to calibrate with the first turn: it can be asked alone."""
    folder = EXAMPLES / "calibration"
    lines = (folder / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["messages"][:2] for line in lines]
    return [
        Question(read(folder / user["content"][0]["path"]), assistant["content"])
        for user, assistant in asked
    ]


def read(path: Path) -> Samples:
    """[N] at 16 kHz"""
    return decode_audio(path.read_bytes(), max_seconds=LONGEST_S)


@contextmanager
def small_model() -> Iterator[Path]:
    """A models directory with it, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        write_small(Path(folder))
        yield Path(folder)
