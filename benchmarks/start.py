"""bench.py start: how long weights take to be there, beside reading the same bytes with dd.

python bench.py start [--gigabytes 3] [--rounds 3] [--directory DIR] [--json FILE]
The files are made once, about 2.5 times that size, and used again by the next run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.hardware import say
from benchmarks.start_models import AWQ, OPENS2S, PLAIN, make_models

CACHE = Path.home() / ".cache" / "omnispeech-bench" / "start"
ROOT = Path(__file__).parent.parent
ROWS = (
    # what is told, the way it is measured, and the files that dd reads for the comparison
    ("bf16 LLM alone, this project", "plain", PLAIN),
    ("the same through the buffers of a GPU, nothing sent", "through buffers", PLAIN),
    ("the same, transformers from_pretrained", "transformers", PLAIN),
    ("4-bit LLM, kernel-ready copy", "prepared", "*.prepared-*"),
    ("4-bit LLM, repacked at the start", "repacked", AWQ),
    ("4-bit LLM, the original's order", "original order", OPENS2S),
)
READY = "ready; peak host memory"


def run_way(way: str, models: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.start_worker", way, str(models)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_dd(files: list[Path]) -> dict[str, Any]:
    began = time.perf_counter()
    for file in files:
        subprocess.run(
            ["dd", f"if={file}", "of=/dev/null", "bs=16M"], check=True, stderr=subprocess.DEVNULL
        )
    size = sum(file.stat().st_size for file in files)
    return {"seconds": time.perf_counter() - began, "bytes": size}


def run_server(models: Path) -> dict[str, Any]:
    """From starting the process to the last line of its start: /ready is 200 from there on."""
    command = [sys.executable, "model_worker.py", "--models", str(models), "--port", "0"]
    began = time.perf_counter()
    server = subprocess.Popen(
        [*command, "--device", "cpu", "--dtype", "bf16"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert server.stdout is not None
    try:
        for line in server.stdout:
            if READY in line:
                seconds = time.perf_counter() - began
                return {"seconds": seconds, "peak_bytes": 1e9 * float(line.split()[-2])}
        raise SystemExit("the server did not become ready")
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def bring_into_cache(files: list[Path]) -> None:
    run_dd(files)


def drop_from_cache(files: list[Path]) -> None:
    """The next read of these files comes from the disk."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(models: Path, rounds: int) -> dict[str, Any]:
    """{page cache: {way: {seconds, peak_bytes, dd}}}, ways in turn, round by round."""
    run_way("prepared", models)  # makes the copy
    found: dict[str, Any] = {}
    for cache in ("warm", "cold"):
        prepare = bring_into_cache if cache == "warm" else drop_from_cache
        results: dict[str, list[dict[str, Any]]] = {}
        for number in range(rounds):
            for _, way, pattern in ROWS:
                files = sorted(models.glob(f"{pattern}/*.safetensors"))
                prepare(files)
                dd = run_dd(files)
                prepare(files)
                one = run_way(way, models) | {"dd": dd["seconds"], "bytes": dd["bytes"]}
                results.setdefault(way, []).append(one)
            say(f"{cache}, round {number + 1} of {rounds}")
        prepare(sorted(models.glob("*/*.safetensors")))
        results["server"] = [run_server(models)]
        found[cache] = {way: _medians(ones) for way, ones in results.items()}
    return found


def _medians(ones: list[dict[str, Any]]) -> dict[str, float]:
    keys = [key for key in ones[0] if isinstance(ones[0][key], int | float)]
    result = {key: median(one[key] for one in ones) for key in keys}
    if "dd" in result:
        result["ratio"] = median(one["seconds"] / one["dd"] for one in ones)
    return result


def table(figures: dict[str, Any]) -> str:
    lines = [
        "| what | page cache | GB of dd | dd (s) | load (s) | load to dd | peak memory (GB) |",
        "|---|---|---|---|---|---|---|",
    ]
    for what, way, _ in ROWS:
        for cache, ways in figures.items():
            one = ways[way]
            lines.append(
                f"| {what} | {cache} | {one['bytes'] / 1e9:.2f} | {one['dd']:.2f} | "
                f"{one['seconds']:.2f} | {one['ratio']:.2f} | {one['peak_bytes'] / 1e9:.2f} |"
            )
    for cache, ways in figures.items():
        server = ways["server"]
        lines.append(
            f"| 4-bit LLM, process start to /ready | {cache} | | | {server['seconds']:.2f} | | "
            f"{server['peak_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench.py start", description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of the LLM in bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=CACHE)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    free = shutil.disk_usage(args.directory.parent if args.directory.parent.exists() else "/").free
    say(f"files in {args.directory}; {free / 1e9:.0f} GB are free there")
    make_models(args.directory, args.gigabytes)
    figures = measure(args.directory, args.rounds)
    sys.stdout.write(table(figures) + "\n")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
