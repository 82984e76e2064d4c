"""Trains the small model: `python -m training DIR`, continued where it was stopped."""

import argparse
import logging
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from training.stages import STAGES

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
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    if given.only:
        STAGES[given.only](given.work)
    else:
        train(given.work, given.threads)


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
        logging.info("stage %s", stage)
        flags = ["--only", stage, "--threads", str(threads)]
        if code := subprocess.call([sys.executable, "-m", "training", str(work), *flags]):
            raise SystemExit(code)


if __name__ == "__main__":
    main()
