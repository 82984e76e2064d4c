"""Trains the small model: `python -m training DIR`, continued where it was stopped."""

import argparse
import fcntl
import logging
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from omnispeech.errors import OmniSpeechError
from training.answers import VOICE
from training.judge import Judge
from training.recordings import STRANGERS
from training.stages import STAGES
from training.voices import FLITE, Voice, speak

FIRST = ("settings", "recordings")
# Of about the same length; none of the four needs another.
LANES = (("ear", "vocoder"), ("language", "flow"))
LAST = ("talk", "export", "report")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("work", type=Path, help="directory for data, weights and the model")
    parser.add_argument("--only", choices=STAGES, help="one stage; what it needs must be there")
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use, 2 or more")
    given = parser.parse_args()
    if given.threads < 1:
        parser.error(f"--threads {given.threads}: name a number of processor cores")
    tell(given.only)
    torch.set_num_threads(given.threads)
    try:
        given.work.mkdir(parents=True, exist_ok=True)
        if given.only:
            make(given.work, given.only)
        else:
            check_programs()
            train(given.work, given.threads)
    except (OmniSpeechError, OSError) as exc:
        sys.exit(f"training: {exc}")


def tell(stage: str | None) -> None:
    """Progress goes to the standard output, each line with the stage it is of."""
    number = f"stage {[*STAGES].index(stage) + 1} of {len(STAGES)}, " if stage else ""
    form = f"%(asctime)s {number}%(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def check_programs() -> None:
    """What is needed hours from now is missed at once."""
    for voice in (VOICE, Voice(f"{FLITE}{STRANGERS.people[0]}")):
        speak("one", voice)
    Judge()


def make(work: Path, stage: str) -> None:
    with (work / f"{stage}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{work}: another process is at the stage {stage}; wait for it, or end it")
        logging.info("%s begins", stage)
        STAGES[stage](work)


def train(work: Path, threads: int) -> None:
    """Every stage in a process of its own: the two lanes beside each other, the rest in order."""
    follow(work, FIRST, threads)
    share = max(1, threads // len(LANES))
    with ThreadPoolExecutor(len(LANES)) as pool:
        lanes = [pool.submit(follow, work, lane, share) for lane in LANES]
    for lane in lanes:
        lane.result()
    follow(work, LAST, threads)


def follow(work: Path, stages: Sequence[str], threads: int) -> None:
    for stage in stages:
        flags = ["--only", stage, "--threads", str(threads)]
        if code := subprocess.call([sys.executable, "-m", "training", str(work), *flags]):
            raise SystemExit(code)


if __name__ == "__main__":
    main()
