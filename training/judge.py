"""A recogniser that was not trained here tells what it hears (pocketsphinx, bundled model)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

from omnispeech.errors import OmniSpeechError
from training.domain import NUMBERS, OPERATIONS, SPOKEN, THINGS

JUDGE_HZ = 16_000
INSERTION_PENALTY = 1e-3  # the bundled default puts words between espeak's
ANSWERS, ANY_WORDS = "answers", "words"  # what the judge expects to hear
GRAMMARS = {
    ANSWERS: f"""#JSGF V1.0;
grammar answers;
<number> = {" | ".join(NUMBERS)};
<operation> = {" | ".join(OPERATIONS)};
<thing> = {" | ".join(THINGS)};
public <answer> = <number> <operation> <number> is <number> | <thing>+ | i do not know;
""",
    ANY_WORDS: f"""#JSGF V1.0;
grammar words;
<word> = {" | ".join(SPOKEN)};
public <words> = <word>+;
""",
}


@dataclass(frozen=True, slots=True)
class Score:
    accuracy: float  # 1 - edit distance / words
    exact: float  # sentences
    sentences: int


class Judge:
    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder
        except ImportError as exc:
            raise OmniSpeechError(
                "pocketsphinx is not installed. Run: pip install pocketsphinx"
            ) from exc
        self.decoder = Decoder(samprate=JUDGE_HZ, wip=INSERTION_PENALTY, loglevel="FATAL")
        for name, grammar in GRAMMARS.items():
            self.decoder.add_jsgf_string(name, grammar)

    def hear(
        self, samples: NDArray[np.float32], rate_hz: int, expected: str = ANSWERS
    ) -> list[str]:
        """[N] in [-1, 1] -> words"""
        if not len(samples):
            return []
        pcm = pcm_for_judge(samples, rate_hz)
        self.decoder.activate_search(expected)
        self.decoder.start_utt()
        self.decoder.process_raw(pcm, full_utt=True)
        self.decoder.end_utt()
        found = self.decoder.hyp()
        return found.hypstr.split() if found else []


def pcm_for_judge(samples: NDArray[np.float32], rate_hz: int) -> bytes:
    """16 kHz, with a quarter of a second of nearly silence at both ends."""
    x = soxr.resample(samples.astype(np.float32), rate_hz, JUDGE_HZ)
    x = np.pad(x, JUDGE_HZ // 4)
    x = x + np.random.default_rng(0).normal(0, 3e-4, len(x))
    return (np.clip(x, -1, 1) * 32767).astype("<i2").tobytes()


def distance(said: Sequence[str], heard: Sequence[str]) -> int:
    """Words to insert, delete or replace."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            change = previous + (word != other)
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, change)
    return row[-1]


def score(said: Sequence[Sequence[str]], heard: Sequence[Sequence[str]]) -> Score:
    pairs = list(zip(said, heard, strict=True))
    errors = sum(distance(a, b) for a, b in pairs)
    words = sum(len(a) for a in said)
    exact = sum(list(a) == list(b) for a, b in pairs)
    return Score(1 - errors / max(1, words), exact / max(1, len(pairs)), len(pairs))
