"""Questions, said by many voices of espeak-ng: for training, and by others to be judged with."""

import json
import logging
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from omnispeech.checkpoint.whole_file import sync
from omnispeech.quantization.output import write_text
from training.domain import Dialogue, Domain, Turn, listed
from training.fitting import Clock
from training.voices import FLITE, RATE_HZ, Voice, speak

logger = logging.getLogger(__name__)

HEARD_HZ = 16_000
AT_ONCE = 1000
LANGUAGES = listed(
    "en-us en-us en-us en-gb en-gb en-gb-x-rp en-029 en-us-nyc en-gb-scotland en-gb-x-gbclan "
    "en-gb-x-gbcwmd"
)
# Not steph2, edward2 and klatt3: each sounds nearly as one that is trained on.
HELD_OUT = ("m8", "quincy", "david", "f4", "belinda", "paul", "max")
VARIANTS = listed(
    "Alex Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael "
    "Mike Nguyen RicishayMax RicishayMax2 RicishayMax3 adam anika announcer antonio aunty benjamin "
    "boris caleb ed edward f1 f2 f3 f5 grandma grandpa gustave iven iven2 iven3 iven4 john "
    "kaukovalta klatt klatt2 klatt4 klatt5 klatt6 linda m1 m2 m3 m4 m5 m6 m7 marcelo michel miguel "
    "norbert pablo pedro rob robert sandro shelby steph steph3 travis victor Alicia Storm Tweaky "
    "robosoft3 croak zac whisper"
)
LONGEST_S = 3.9


@dataclass(frozen=True, slots=True)
class Clip:
    start: int  # in the file of samples
    length: int
    words: str
    voice: str


class Recordings:
    """Dialogues with a clip for each question; samples stay on the disk."""

    def __init__(self, work: Path, name: str) -> None:
        stored = json.loads((work / f"{name}.json").read_text())
        self.samples = np.memmap(work / f"{name}.pcm", dtype=np.int16, mode="r")
        self.dialogues = [
            [(Turn(*turn), Clip(*clip)) for turn, clip in dialogue] for dialogue in stored
        ]

    def read(self, clip: Clip) -> NDArray[np.float32]:
        """[N] at HEARD_HZ"""
        stored = self.samples[clip.start : clip.start + clip.length]
        return stored.astype(np.float32) / np.float32(32768)


@dataclass(frozen=True, slots=True)
class Voices:
    """Of whom dialogues are said, each by one."""

    variants: tuple[str, ...] = ()  # of espeak-ng
    languages: tuple[str, ...] = LANGUAGES
    people: tuple[str, ...] = ()  # of flite
    by_people: float = 0.0  # part of the dialogues

    def draw(self, rng: random.Random) -> tuple[Voice, float]:
        """And by how much the recording is stretched, as another throat would."""
        if self.by_people and rng.random() < self.by_people:
            name, speeds = FLITE + rng.choice(self.people), (140, 200)
        else:
            name = f"{rng.choice(self.languages)}+{rng.choice(self.variants)}"
            speeds = (125, 205)
        stretch = rng.uniform(0.9, 1.12) if rng.random() < 0.6 else 1.0
        return Voice(name, rng.randint(*speeds), rng.randint(20, 80)), stretch


TRAINED = Voices(VARIANTS, people=("slt", "awb", "kal16", "kal"), by_people=0.3)
# espeak-ng's en-gb has no variants: it is one voice, which is trained on.
JUDGED = Voices(HELD_OUT, tuple(language for language in LANGUAGES if language != "en-gb"))
STRANGERS = Voices(people=("rms",), by_people=1.0)  # made of what another person said


def record(work: Path, name: str, count: int, voices: Voices) -> Recordings:
    """Makes `count` dialogues, unless they are there."""
    if not (work / f"{name}.json").exists():
        _record(work, name, count, voices)
    return Recordings(work, name)


def _record(work: Path, name: str, count: int, voices: Voices) -> None:
    stored, start, clock = [], 0, Clock(0, count)
    with (work / f"{name}.pcm").open("wb") as file, ThreadPoolExecutor(2) as pool:
        drawn = _draw(name, count, voices)
        while tasks := list(islice(drawn, AT_ONCE)):
            for dialogue, voice, clips in pool.map(_said, tasks):
                entry = []
                for turn, samples in zip(dialogue.turns, clips, strict=True):
                    file.write(samples.tobytes())
                    clip = (start, len(samples), turn.question, voice)
                    entry.append(((turn.question, turn.answer), clip))
                    start += len(samples)
                stored.append(entry)
            logger.info("%s: dialogue %s", name, clock.told(len(stored)))
    sync(work / f"{name}.pcm")
    write_text(work / f"{name}.json", json.dumps(stored))


Task = tuple[Dialogue, Voice, float]


def _draw(name: str, count: int, voices: Voices) -> Iterator[Task]:
    rng, domain = random.Random(name), Domain()
    for _ in range(count):
        yield (domain.draw(rng), *voices.draw(rng))


def _said(task: Task) -> tuple[Dialogue, str, list[NDArray[np.int16]]]:
    dialogue, voice, stretch = task
    clips = [_clip(turn.question, voice, stretch) for turn in dialogue.turns]
    return dialogue, voice.name, clips


def _clip(text: str, voice: Voice, stretch: float) -> NDArray[np.int16]:
    """16 kHz, without silence at its ends, the loudest sample at 0.7"""
    x = speak(text, voice)
    x = soxr.resample(x, RATE_HZ, HEARD_HZ * stretch)
    loud = np.nonzero(np.abs(x) > 0.01 * np.abs(x).max())[0]
    x = x[loud[0] : loud[-1] + 400][: int(LONGEST_S * HEARD_HZ)]
    return (x * (0.7 * 32767 / np.abs(x).max())).astype(np.int16)
