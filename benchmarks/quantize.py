"""bench.py quantize: quality, memory, time and robustness of the quantizer, side by side.

python bench.py quantize                    everything; AutoAWQ's own figures need a flag
python bench.py quantize --quick            the same on a small scale
python bench.py quantize --only quality matvec
python bench.py quantize --autoawq-python ENV/bin/python
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernels, runs, sound_quality
from benchmarks.byte_lm import ByteLM, Recipe
from benchmarks.hardware import hardware, say
from benchmarks.outliers import MODERATE, STRONG, inject
from benchmarks.quality import (
    METHODS,
    Effort,
    Judged,
    held_out_text,
    mean_kl,
    over_seeds,
    spread_kl,
)
from benchmarks.tables import ROWS, quality_table, rows_table
from benchmarks.training import plain_model, sound_model

CACHE = Path.home() / ".cache" / "omnispeech-bench"


class Bench:
    """What the parts share: settings, trained models, a folder that is removed afterwards."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.recipe = replace(Recipe(), steps=100) if args.quick else Recipe()
        self.effort = Effort(seeds=1, calibration=16, evaluation=48) if args.quick else Effort()
        self.effort = replace(self.effort, seeds=args.seeds or self.effort.seeds)

    def model(self) -> ByteLM:
        return plain_model(self.recipe, self.args.cache)

    def quality(self) -> dict[str, Any]:
        """Every method on the model as it is, with moderate and with strong outliers."""
        plain = self.model()
        models = {
            "none": plain,
            "moderate": inject(plain, MODERATE),
            "strong": inject(plain, STRONG),
        }
        return {name: self._methods(model, name) for name, model in models.items()}

    def _methods(self, model: ByteLM, outliers: str) -> dict[str, Any]:
        held_out = held_out_text(model, self.effort)
        result = {}
        for name, settings in METHODS.items():
            judged = over_seeds(model, settings, self.effort, held_out)
            result[name] = summary(judged)
            say(f"outliers {outliers}, {name}: KL {result[name]['kl']:.6f}")
        return result

    def sound(self) -> dict[str, Any]:
        ear = sound_quality.ear_for(self.model())
        model = sound_model(self.recipe, self.args.cache, ear)
        return sound_quality.compare(model, ear, self.effort)

    def memory(self) -> dict[str, Any]:
        size, shapes = (1 << 28, ["small"]) if self.args.quick else (2 * 10**9, ["small", "large"])
        return runs.memory(self.folder, self.args.autoawq_python, size=size, shapes=shapes)

    def time(self) -> dict[str, Any]:
        python = self.args.autoawq_python
        if python is None:
            raise SystemExit("bench.py quantize: the part time needs --autoawq-python")
        layers, rounds = (2, 1) if self.args.quick else (8, 3)
        return runs.timing(self.folder, self.model(), python, layers=layers, rounds=rounds)

    def matvec(self) -> dict[str, Any]:
        return kernels.matvec()

    def resume(self) -> dict[str, Any]:
        return runs.resuming(self.folder, kills=3 if self.args.quick else 20)


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "quality": Bench.quality,
    "sound": Bench.sound,
    "memory": Bench.memory,
    "time": Bench.time,
    "matvec": Bench.matvec,
    "resume": Bench.resume,
}


def summary(judged: list[Judged]) -> dict[str, Any]:
    return {
        "kl": mean_kl(judged),
        "kl_spread": spread_kl(judged),
        "worse_groups": sum(j.worse_groups for j in judged),
        "groups": sum(j.groups for j in judged),
        "seeds": [asdict(j) for j in judged],
    }


def chosen_parts(args: argparse.Namespace) -> list[str]:
    if args.only:
        return list(args.only)
    return [name for name in PARTS if name != "time" or args.autoawq_python]


def load(path: Path | None) -> dict[str, Any]:
    """Earlier figures, which parts that are not run now keep."""
    if path is None or not path.exists():
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def main(arguments: list[str]) -> None:
    args = parser().parse_args(arguments)
    figures = load(args.json)
    device = torch.device("cpu")
    for name in chosen_parts(args):
        say(f"measuring {name}")
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            measured = PARTS[name](Bench(args, Path(folder)))
        figures[name] = measured | {"hardware": f"{hardware(device)}, torch {torch.__version__}"}
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(rows_table(figures) + "\n")
    if "quality" in figures:
        sys.stdout.write("\n" + quality_table(figures["quality"]) + "\n")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.py quantize",
        description="Measures the quantizer; rows: " + "; ".join(row.what for row in ROWS),
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small scale: a trial of the command")
    parser.add_argument("--seeds", type=int, help="calibration seeds; default: 3, quick: 1")
    parser.add_argument("--cache", type=Path, default=CACHE, help="trained models are kept here")
    parser.add_argument("--work", type=Path, help="for some GB of temporary files")
    parser.add_argument(
        "--autoawq-python", type=Path, metavar="PYTHON", help="of an environment with AutoAWQ 0.2.9"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="figures; parts not run are kept")
    return parser
