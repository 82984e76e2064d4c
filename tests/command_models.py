"""Small random models for the quantizing commands, and the commands on them."""

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.quantization.autoawq_engine import extract
from omnispeech.quantize_cli import commands
from omnispeech.quantize_cli.choices import Choices, choices
from omnispeech.quantize_cli.flags import add_calibration, add_method, add_quality, add_run
from omnispeech.tiny.directory import write_tiny

QUICK = ["--q-group-size", "32", "--max-tokens", "256", "--device", "cpu"]
VARIABLES = ("SEQ_LEN", "FORCE_CPU", "OMNISPEECH_MODELS")


def write_originals(place: Path) -> None:
    """`models`: a models directory; `text`: its LLM as a plain text model; `calibration.txt`."""
    write_tiny(place / "models")
    extract(LanguageFiles.open(place / "models" / "OpenS2S", "llm"), place / "text", 1 << 30)
    (place / "text" / "custom.py").write_text("# of the model\n")
    sentences = "The quick brown fox jumps over the lazy dog. " * 30
    (place / "calibration.txt").write_text(sentences)


def quantize(model: Path, *flags: str) -> int:
    return commands.quantize(["--model_path", str(model), *QUICK, *flags])


def quantize_llm(models: Path, *flags: str) -> int:
    return commands.quantize_llm_awq(["--models", str(models), *QUICK, *flags])


def chosen(*flags: str, **environ: str) -> Choices:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for add in (add_method, add_quality, add_calibration, add_run):
        add(parser)
    return choices(parser.parse_args(flags), environ)


def config(directory: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return value


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")
