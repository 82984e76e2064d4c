"""Checkpoints saved in the middle of LoRA training: merged while they are read."""

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnispeech.checkpoint.reader import Tensors
from omnispeech.checkpoint.shards import TensorFiles, Wanted
from omnispeech.errors import CheckpointError

MATRIX = re.compile(r"(?P<target>.+)\.lora_(?P<side>[AB])\.default\.weight")

# Variants of LoRA that compute something else than W + alpha / r * B @ A.
UNSUPPORTED = (
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)


class MergedLora:
    """Looks like the merged checkpoint: W' = W + alpha / r * B @ A, computed in float32.

    Inside peft everything of the LLM lies one `model.` deeper, and newer versions call the
    adapted weight `base_layer.weight`.
    """

    def __init__(self, tensors: TensorFiles, lora_config: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._rank, alpha = _rank_and_alpha(lora_config)
        self._scale = alpha / self._rank
        found = [(name, MATRIX.fullmatch(name)) for name in tensors.names]
        self._stored = {plain_name(name): name for name, matrix in found if matrix is None}
        self._sides = {
            (f"{plain_name(matrix['target'])}.weight", matrix["side"]): name
            for name, matrix in found
            if matrix is not None
        }
        self._targets = {target for target, _ in self._sides}
        for target in sorted(self._targets):
            self._check(target)

    @property
    def names(self) -> Collection[str]:
        return self._stored.keys()

    @property
    def bytes_read(self) -> int:
        return self._tensors.bytes_read

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self._stored[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(self._stored[name])

    def read(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        return next(self.read_all([(name, dtype)], device))

    def read_all(self, wanted: Wanted, device: torch.device, threads: int = 0) -> Tensors:
        """As `read`, of several that follow one another."""
        parts = [part for name, dtype in wanted for part in self._needed(name, dtype)]
        with closing(self._tensors.read_all(parts, device, threads)) as tensors:
            for name, dtype in wanted:
                if name not in self._targets:
                    yield next(tensors)
                    continue
                weight, a, b = (next(tensors) for _ in range(3))
                yield (weight + self._scale * (b @ a)).to(dtype)

    def read_rows(self, name: str, rows: Sequence[int] | Tensor) -> Tensor:
        if name not in self._targets:
            return self._tensors.read_rows(self._stored[name], rows)
        weight = self.read(name, torch.device("cpu"), self.dtype(name))
        return weight[torch.as_tensor(rows, dtype=torch.long).cpu()]

    def _needed(self, name: str, dtype: torch.dtype) -> Wanted:
        if name not in self._targets:
            return [(self._stored[name], dtype)]
        return [(stored, torch.float32) for stored in self._parts(name)]

    def _parts(self, target: str) -> tuple[str, str, str]:
        return self._stored[target], self._sides[target, "A"], self._sides[target, "B"]

    def _check(self, target: str) -> None:
        try:
            weight, a, b = (self._tensors.shape(name) for name in self._parts(target))
        except KeyError as exc:
            raise CheckpointError(
                f"the LoRA of {target} is not whole; it needs the base weight, lora_A and lora_B"
            ) from exc
        if (a, b) != ((self._rank, weight[1]), (weight[0], self._rank)):
            raise CheckpointError(
                f"the LoRA of {target} has lora_A {list(a)} and lora_B {list(b)}, which do not fit "
                f"the weight {list(weight)} and r={self._rank} of lora_config"
            )


def merged(tensors: TensorFiles, directory: Path, raw: Mapping[str, Any]) -> TensorFiles:
    """`tensors` of `directory`, merged if there is LoRA among them; `raw`: its config.json."""
    if not has_lora(tensors.names):
        return tensors
    if not raw.get("lora_config"):
        raise CheckpointError(
            f"{directory} holds LoRA tensors, but its config.json has no lora_config; "
            "r and lora_alpha are needed to merge them"
        )
    return MergedLora(tensors, raw["lora_config"])


def has_lora(names: Collection[str]) -> bool:
    return any(MATRIX.fullmatch(name) for name in names)


def plain_name(name: str) -> str:
    """The name the tensor has after merging."""
    name = re.sub(r"^llm_model\.model\.(?=model\.|lm_head\.)", "llm_model.", name)
    return name.replace(".base_layer.", ".")


def _rank_and_alpha(config: Mapping[str, Any]) -> tuple[int, float]:
    if odd := [name for name in UNSUPPORTED if config.get(name)]:
        raise CheckpointError(
            f"lora_config has {odd[0]}={config[odd[0]]!r}, which cannot be merged here; "
            "merge the checkpoint with peft"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(
            f"lora_config has r={rank!r} and lora_alpha={alpha!r}; both must be numbers"
        )
    return rank, alpha
