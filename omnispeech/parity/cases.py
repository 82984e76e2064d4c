"""Golden cases on disk: requests, and what the original made of them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from omnispeech.errors import CheckpointError
from omnispeech.prompt import AUDIO, AudioMark, PromptMessage

PREFIX = "expected-"
RATE_HZ = 16_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str  # "checkpoint/case"
    checkpoint: Path
    messages: tuple[PromptMessage, ...]
    sounds: tuple[NDArray[np.float32], ...]  # [N] each, in the order of the prompt
    facts: dict[str, Any]  # the JSON file
    tensors: dict[str, Tensor]


def checkpoints(directory: Path) -> list[Path]:
    """Those that have expected values beside them."""
    expected = sorted(directory.glob(f"{PREFIX}*/"))
    if not expected:
        raise CheckpointError(f"{directory} holds no {PREFIX}* folder; is it a golden set?")
    return [directory / path.name.removeprefix(PREFIX) for path in expected]


def read_cases(checkpoint: Path) -> Iterator[Case]:
    expected = checkpoint.with_name(PREFIX + checkpoint.name)
    names = {path.stem for path in expected.iterdir() if path.suffix in (".json", ".safetensors")}
    if not names:
        raise CheckpointError(f"{expected} holds no case")
    for name in sorted(names):
        yield _read_case(checkpoint, expected / name)


def _read_case(checkpoint: Path, stem: Path) -> Case:
    facts_file, tensors_file = stem.with_suffix(".json"), stem.with_suffix(".safetensors")
    for path in (facts_file, tensors_file):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; a case is a .json and a .safetensors file")
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    items = [_items(message["content"]) for message in facts["messages"]]
    waves = [item["wave"] for turn in items for item in turn if "wave" in item]
    return Case(
        name=f"{checkpoint.name}/{stem.name}",
        checkpoint=checkpoint,
        messages=tuple(
            PromptMessage(message["role"], tuple(map(_part, turn)))
            for message, turn in zip(facts["messages"], items, strict=True)
        ),
        sounds=tuple(_read_wave(checkpoint.parent / "waves" / f"{wave}.wav") for wave in waves),
        facts=facts,
        tensors=load_file(tensors_file),
    )


def _items(content: str | dict[str, str] | list[dict[str, str]]) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [{"text": content}]
    return content if isinstance(content, list) else [content]


def _part(item: dict[str, str]) -> str | AudioMark:
    return AUDIO if "wave" in item else item["text"]


def _read_wave(path: Path) -> NDArray[np.float32]:
    samples, rate_hz = soundfile.read(path, dtype="float32")
    if rate_hz != RATE_HZ or samples.ndim != 1:
        raise CheckpointError(f"{path} is not mono at {RATE_HZ} Hz, as a golden sound must be")
    return samples


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite if the shapes differ or a number is not finite."""
    if actual.shape != expected.shape:
        return float("inf")
    if not actual.numel():
        return 0.0
    largest = (actual.double() - expected.double()).abs().max()
    return float(largest) if torch.isfinite(largest) else float("inf")
