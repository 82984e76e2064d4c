"""The voice that answers: every word recorded once, on the grid of the speech units.

A word is cut at its edges and filled up to whole units, so that it always is the same units,
whatever stands beside it; it has one form inside a sentence and one at its end.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.domain import SPOKEN, sentences_of
from training.fitting import save
from training.spectrum import HOP, log_mel, normalised, pitch
from training.voices import RATE_HZ, Voice, speak

UNIT_SAMPLES = 1764  # 80 ms
VOICE = Voice("en-us+klatt", 185)
EDGE = 0.004  # of the peak: quieter is not part of the word
PEAK = 0.7
TAIL_UNITS = 2  # silence after the last word
UNITS = 512
FRAMES_PER_UNIT = 7  # of the mel that units are made of
Samples = NDArray[np.float32]


def word_samples(word: str, last: bool) -> Samples:
    """[N], a multiple of UNIT_SAMPLES"""
    x = speak(word + ("." if last else ","), VOICE)
    loud = np.nonzero(np.abs(x) > EDGE * np.abs(x).max())[0]
    x = x[max(0, loud[0] - 60) : loud[-1] + 200]
    fade = np.linspace(1, 0, 120, dtype=np.float32)
    x[-120:] *= fade
    x = np.pad(x, (0, -len(x) % UNIT_SAMPLES))
    return x


@dataclass(frozen=True, slots=True)
class Lexicon:
    """samples, units: of each word inside a sentence and, under `word.`, at its end."""

    samples: dict[str, Samples]
    units: dict[str, list[int]]
    silence: int  # the unit of silence
    centres: Tensor  # [UNITS, FRAMES_PER_UNIT * M], not normalised

    def keys(self, words: list[str]) -> list[str]:
        return [*words[:-1], words[-1] + "."]

    def speech(self, words: list[str]) -> Samples:
        parts = [self.samples[key] for key in self.keys(words)]
        return np.concatenate([*parts, np.zeros(TAIL_UNITS * UNIT_SAMPLES, np.float32)])

    def read_units(self, text: str) -> list[int]:
        """Of one sentence or more, as they are read aloud."""
        return [unit for words in sentences_of(text) for unit in self.spoken_units(words)]

    def spoken_units(self, words: list[str]) -> list[int]:
        units = [unit for key in self.keys(words) for unit in self.units[key]]
        return units + [self.silence] * TAIL_UNITS


def record_lexicon() -> dict[str, Samples]:
    forms = {word + end: word_samples(word, bool(end)) for word in SPOKEN for end in ("", ".")}
    loudest = max(float(np.abs(x).max()) for x in forms.values())
    return {key: x * np.float32(PEAK / loudest) for key, x in forms.items()}


def unit_windows(samples: Samples) -> Tensor:
    """[n UNIT_SAMPLES] -> [n, FRAMES_PER_UNIT * M]: what a unit stands for"""
    mel = log_mel(torch.from_numpy(samples)[None], RATE_HZ, hop=UNIT_SAMPLES // FRAMES_PER_UNIT)
    count = len(samples) // UNIT_SAMPLES
    return mel[0].T.reshape(count, -1)


def k_means(points: Tensor, count: int, rounds: int = 60) -> Tensor:
    """[N, D] -> centres [count, D]; fixed start, so that a second run gives the same."""
    generator = torch.Generator().manual_seed(1)
    centres = points[torch.randperm(len(points), generator=generator)[:count]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        for i in range(count):
            if len(mine := points[nearest == i]):
                centres[i] = mine.mean(0)
            else:  # an unused centre goes to the point that is worst served
                centres[i] = points[torch.cdist(points, centres).min(1).values.argmax()]
    return centres


def make_lexicon(work: Path) -> Lexicon:
    file = work / "lexicon.pt"
    if not file.exists():
        _write(file)
    stored = torch.load(file, weights_only=True)
    samples = {key: x.numpy() for key, x in stored["samples"].items()}
    return Lexicon(samples, stored["units"], stored["silence"], stored["centres"])


def _write(file: Path) -> None:
    samples = record_lexicon()
    windows = {key: unit_windows(x) for key, x in samples.items()}
    silent = unit_windows(np.zeros(UNIT_SAMPLES, np.float32))
    centres = torch.cat((silent, k_means(torch.cat(list(windows.values())), UNITS - 1)))
    units = {key: torch.cdist(w, centres).argmin(1).tolist() for key, w in windows.items()}
    stored = {
        "samples": {key: torch.from_numpy(x) for key, x in samples.items()},
        "units": units,
        "silence": 0,
        "centres": centres,
    }
    save(file, stored)


@dataclass(frozen=True, slots=True)
class Sentence:
    """An answer as the decoder is trained on it."""

    units: list[int]  # n
    mel: Tensor  # [M, F(n)], normalised
    f0: Tensor  # [F(n)] Hz
    samples: Tensor  # [N]


def make_sentence(lexicon: Lexicon, words: list[str]) -> Sentence:
    samples = torch.from_numpy(lexicon.speech(words))
    mel = normalised(log_mel(samples[None], RATE_HZ)[0])
    frames = mel.shape[1]
    return Sentence(
        lexicon.spoken_units(words),
        mel,
        pitch(samples, RATE_HZ, frames),
        torch.nn.functional.pad(samples, (0, max(0, frames * HOP - len(samples)))),
    )
