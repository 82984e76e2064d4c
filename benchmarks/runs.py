"""Whole quantization runs in processes of their own: memory, time, and going on after a kill."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.byte_lm import ByteLM, write_model
from benchmarks.corpus import VOCABULARY, pieces
from benchmarks.hardware import say
from benchmarks.unified import SHAPES, SMALL, write_unified
from omnispeech.checkpoint.language import LanguageFiles

ROOT = Path(__file__).parent.parent
AUTOAWQ = ROOT / "benchmarks" / "autoawq_worker.py"
REPORTS = ("quantization_report.json", "quantization_report.log")  # time and memory differ


@dataclass(frozen=True, slots=True)
class Ran:
    seconds: float
    peak_bytes: int
    imports_bytes: int  # of the peak, what importing took


def command(job: Path, python: Path | None = None) -> list[str]:
    """Ours, or AutoAWQ in the environment of `python`."""
    if python is None:
        return [sys.executable, "-m", "benchmarks.worker", str(job)]
    return [str(python), str(AUTOAWQ), str(job)]


def run_job(folder: Path, job: Mapping[str, Any], python: Path | None = None) -> Ran:
    """Raises RuntimeError with what the process said when it fails."""
    shutil.rmtree(job["output"], ignore_errors=True)
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    ran = subprocess.run(command(path, python), cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{command(path, python)} failed: {ran.stderr[-2000:]}")
    return Ran(**json.loads(ran.stdout.splitlines()[-1]))


def text_ids(sequences: int, length: int, vocabulary: int = VOCABULARY) -> list[list[int]]:
    return (pieces("calibration", sequences, length, 0) % vocabulary).tolist()


def memory(
    folder: Path, autoawq: Path | None, *, size: int, shapes: Sequence[str]
) -> dict[str, Any]:
    """Peaks of the default method on LLMs inside unified checkpoints of so many bytes."""
    result: dict[str, Any] = {}
    for name in shapes:
        source = folder / f"unified-{name}"
        written = write_unified(source, SHAPES[name], size)
        vocabulary = LanguageFiles.open(source, "llm").config.vocab_size
        job = {
            "source": str(source),
            "part": "llm",
            "output": str(folder / "quantized"),
            "ids": text_ids(16, 256, vocabulary),
            "method": {"group_size": 64},
        }
        result[name] = {"ours": _memory_of(run_job(folder, job), written)}
        if autoawq and name == "small":  # of the large one AutoAWQ takes hours on a CPU
            extract(source, folder / "extracted")
            theirs = {**job, "source": str(folder / "extracted"), "output": str(folder / "autoawq")}
            result[name]["autoawq"] = _memory_of(run_job(folder, theirs, autoawq), written)
        shutil.rmtree(source)
    return result


def _memory_of(ran: Ran, file_bytes: int) -> dict[str, float]:
    return {
        "file_bytes": file_bytes,
        "peak_bytes": ran.peak_bytes,
        "imports_bytes": ran.imports_bytes,
        "of_file": ran.peak_bytes / file_bytes,
        "seconds": ran.seconds,
    }


def extract(source: Path, directory: Path) -> None:
    """The LLM alone, as a directory that others can read."""
    files = LanguageFiles.open(source, "llm")
    layers = range(files.config.num_hidden_layers)
    names = [*files.outside_names(), *(n for i in layers for n in files.layer_names(i))]
    weights: dict[str, Tensor] = {name: files.read(name, torch.float16) for name in names}
    write_model(ByteLM(files.raw, weights), directory, torch.float16)


def timing(
    folder: Path, model: ByteLM, autoawq: Path, *, layers: int, rounds: int
) -> dict[str, Any]:
    """AWQ without error compensation, ours and AutoAWQ's, in turns on the same tokens."""
    write_model(deepened(model, layers), folder / "deep", torch.float16)
    job = {
        "source": str(folder / "deep"),
        "part": None,
        "output": str(folder / "timed"),
        "ids": text_ids(48, 128),
    }
    ways: dict[str, tuple[dict[str, Any], Path | None]] = {
        "autoawq": ({"group_size": 64}, autoawq),
        "awq only": ({"group_size": 64, "rounding": "rtn"}, None),
        "autoawq recipe": ({"group_size": 64, "compatible": True}, None),
        "default": ({"group_size": 64}, None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (method, python) in ways.items():
            seconds[name].append(run_job(folder, {**job, "method": method}, python).seconds)
            say(f"{name}: {seconds[name][-1]:.1f} s")
    medians = {name: median(values) for name, values in seconds.items()}
    ratios = {name: value / medians["autoawq"] for name, value in medians.items()}
    return {"seconds": seconds, "median_s": medians, "ratio_to_autoawq": ratios}


def deepened(model: ByteLM, layers: int) -> ByteLM:
    """The same layers over again: for time only."""
    own = model.config.num_hidden_layers
    weights = {n: w for n, w in model.weights.items() if not n.startswith("model.layers.")}
    for layer in range(layers):
        prefix = f"model.layers.{layer % own}."
        for name, weight in model.weights.items():
            if name.startswith(prefix):
                weights[name.replace(prefix, f"model.layers.{layer}.")] = weight
    return ByteLM({**model.raw, "num_hidden_layers": layers}, weights)


def resuming(folder: Path, *, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kills a run at random times, lets it go on, and compares every byte of the result."""
    source = folder / "small-unified"
    write_unified(source, SMALL, 0)
    vocabulary = LanguageFiles.open(source, "llm").config.vocab_size
    job = {
        "source": str(source),
        "part": "llm",
        "output": str(folder / "whole"),
        "ids": text_ids(32, 128, vocabulary),
        "method": {"group_size": 64},
    }
    whole_s = timed(folder, job)
    expected = digests(folder / "whole")
    chance = random.Random(seed)
    identical = 0
    for number in range(kills):
        output = folder / f"killed-{number}"
        killed = {**job, "output": str(output)}
        while not killed_run(folder, killed, chance.uniform(0, whole_s)):
            whole_s = timed(folder, killed)  # the machine has become quicker
            shutil.rmtree(output)
        run_again(folder / "job.json")
        identical += digests(output) == expected
        say(f"killed {number + 1} of {kills}: {identical} identical")
        shutil.rmtree(output)
    return {"kills": kills, "identical": identical}


def timed(folder: Path, job: Mapping[str, Any]) -> float:
    """Seconds of a whole run, imports included."""
    began = time.perf_counter()
    run_job(folder, job)
    return time.perf_counter() - began


def killed_run(folder: Path, job: Mapping[str, Any], after_s: float) -> bool:
    """Whether it was still at work then."""
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    process = subprocess.Popen(
        command(path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def run_again(job: Path) -> None:
    subprocess.run(command(job), cwd=ROOT, capture_output=True, text=True, check=True)


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file but the reports, which hold times."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.name not in REPORTS
    }
