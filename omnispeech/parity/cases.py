"""Golden cases on disk: requests, and what the original made of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json
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


def case_names(checkpoint: Path) -> list[str]:
    """Of the JSON files that tell a request; others beside them are notes."""
    expected = _expected(checkpoint)
    names = sorted(path.name.removesuffix(".json") for path in expected.glob("*.json"))
    names = [name for name in names if "messages" in read_json(expected / f"{name}.json")]
    if not names:
        raise CheckpointError(f"{expected} holds no case")
    return names


def read_case(checkpoint: Path, name: str) -> Case:
    expected = _expected(checkpoint)
    facts = read_json(expected / f"{name}.json")
    items = [_items(message["content"]) for message in facts["messages"]]
    waves = [item["wave"] for turn in items for item in turn if item.get("wave")]
    return Case(
        name=f"{checkpoint.name}/{name}",
        checkpoint=checkpoint,
        messages=tuple(
            PromptMessage(message["role"], tuple(map(_part, turn)))
            for message, turn in zip(facts["messages"], items, strict=True)
        ),
        sounds=tuple(_read_wave(checkpoint.parent / "waves", wave) for wave in waves),
        facts=facts,
        tensors=_tensors(expected / f"{name}.safetensors"),
    )


def _expected(checkpoint: Path) -> Path:
    return checkpoint.with_name(PREFIX + checkpoint.name)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}") from exc


def _items(content: Any) -> list[dict[str, str]]:
    items = content if isinstance(content, list) else [content]
    return [{"text": item} if isinstance(item, str) else item for item in items]


def _part(item: dict[str, str]) -> str | AudioMark:
    """An item with sound counts as sound alone (spec: opens2s 5)."""
    return AUDIO if item.get("wave") else item.get("text", "")


def _read_wave(folder: Path, name: str) -> NDArray[np.float32]:
    """`name` as it is, or with the ending that it lacks."""
    paths = [folder / f"{name}{ending}" for ending in ("", ".wav", ".flac")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} has no sound {name!r}, nor {name}.wav or {name}.flac")
    try:
        samples, rate_hz = soundfile.read(path, dtype="float32")
    except soundfile.SoundFileError as exc:
        raise CheckpointError(f"{path} cannot be decoded: {exc}") from exc
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
