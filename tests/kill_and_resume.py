"""Kills a quantization at random moments and lets it go on: python kill_and_resume.py DIR [POINTS].

DIR must be empty. Prints how many results were the same as that of an undisturbed run.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from language_model_files import language_model
from quantization_runs import contents, quantize

from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.quantization.state import partial_path

SHARD = 40_000  # bytes: several files


def start(source: LanguageFiles, output: Path) -> int:
    """The process that quantizes."""
    if process := os.fork():
        return process
    try:
        quantize(source, output, shard_size=SHARD)
    finally:
        os._exit(0)


def killed_and_resumed(source: LanguageFiles, output: Path, seconds: float) -> bool:
    """Whether the process was still at work when it was killed."""
    process = start(source, output)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    interrupted = partial_path(output).exists()
    os.waitpid(start(source, output), 0)
    return interrupted


def main(directory: Path, points: int, seed: int = 0) -> None:
    draw = random.Random(seed)
    source = language_model(directory / "model", num_hidden_layers=6)
    quantize(source, directory / "warm", shard_size=SHARD)
    began = time.monotonic()
    quantize(source, directory / "undisturbed", shard_size=SHARD)
    whole = time.monotonic() - began
    expected = contents(directory / "undisturbed")
    same = interrupted = 0
    output = directory / "result"
    for _ in range(points):
        interrupted += killed_and_resumed(source, output, draw.uniform(0, whole))
        same += contents(output) == expected and not partial_path(output).exists()
        shutil.rmtree(output)
    sys.stdout.write(f"{same} of {points} the same, {interrupted} killed at work\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20)
