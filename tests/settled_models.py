"""A models directory with nothing left to do for a start: downloaded, quantized, converted,
repacked."""

from pathlib import Path

import torch
from quantized_models import CPU, quantize_language_model

from omnispeech.assembly import load_sources
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import choose_sources
from omnispeech.checkpoint.opens2s import Loading
from omnispeech.tiny.directory import write_tiny

AWQ = "OpenS2S-llm-awq"
NAMES = ("OpenS2S", "glm-4-voice-decoder", AWQ)

State = dict[str, tuple[int, int, int]]


def write_settled(models: Path) -> Path:
    """OpenS2S, its decoder and a quantized LLM, all in the manifest, after a first start."""
    write_tiny(models)
    quantize_language_model(models / "OpenS2S", models / AWQ)
    for name in NAMES:
        Manifest(models).enter(name, {"by": "the tests"})
    load_sources(choose_sources(models), CPU, torch.float32, loading=Loading(prepare=True))
    return models


def state(models: Path) -> State:
    """Size, time of change and number of each file and directory below, by path."""
    found = {}
    for path in sorted(models.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(models))] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found
