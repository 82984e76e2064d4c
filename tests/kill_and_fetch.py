"""Kills a fetch at random moments and starts again: python kill_and_fetch.py URL DIR POINTS SEED.

URL is that of a hub with the repositories of download_models.py. Each fetch is killed at work: one
that was done before is not counted. Prints how many results were the same as that of an
undisturbed run.
"""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from download_models import QUICK, beside, decoder_files, found, opens2s_files, published

from omnispeech.checkpoint.manifest import Manifest
from omnispeech.config import HubConfig
from omnispeech.download.directory import fetch_all
from omnispeech.download.present import settle

NAMES = ["OpenS2S", "glm-4-voice-decoder"]
DECODER = {path: data for path, data in decoder_files().items() if path != "speech.wav"}


def start(hub: HubConfig, models: Path) -> int:
    """A process that does what a start does."""
    if process := os.fork():
        return process
    status = 1
    try:
        missing = [name for name in NAMES if not settle(models / name, hub)]
        if missing:
            fetch_all(missing, models, hub, deep=False, patience=QUICK)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def killed(hub: HubConfig, models: Path, seconds: float) -> bool:
    """Whether it was still at work."""
    process = start(hub, models)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def whole(models: Path) -> bool:
    for name in NAMES:
        Manifest(models).check(name, deep=True)
    return (
        found(models / NAMES[0]) == published(opens2s_files())
        and found(models / NAMES[1]) == DECODER
        and beside(models) == {*NAMES, "omnispeech-manifest.json"}
        and all(Manifest(models).entry(name).files.keys() for name in NAMES)
    )


def main(url: str, place: Path, points: int, seed: int) -> None:
    hub = HubConfig(hub_endpoint=url, connections=2)
    draw = random.Random(seed)
    began = time.monotonic()
    os.waitpid(start(hub, place / "undisturbed"), 0)
    seconds = time.monotonic() - began
    same = 0
    models = place / "models"
    for _ in range(points):
        while not killed(hub, models, draw.uniform(0, seconds)):
            shutil.rmtree(models)
            seconds *= 0.8
        _, status = os.waitpid(start(hub, models), 0)
        same += status == 0 and whole(models)
        shutil.rmtree(models)
    sys.stdout.write(f"{same} of {points} the same\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
