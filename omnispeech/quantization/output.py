"""The final directory: what servers read, put together from finished layers and untouched tensors.

(spec: quantization 2.12)
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnispeech.checkpoint.files import replace_file
from omnispeech.checkpoint.language import TOKENIZER_FILES, LanguageFiles
from omnispeech.checkpoint.salient import FILE as SIDECAR
from omnispeech.checkpoint.shards import INDEX, SINGLE
from omnispeech.checkpoint.tensor_file import TensorFile, write_tensor_file
from omnispeech.errors import ConfigError
from omnispeech.layers.packing import Scheme
from omnispeech.quantization.stored import half_in_place, tensor_digest

HEAD = ("model.norm.weight", "lm_head.weight")  # behind the layers; all else stands before them
REPLACEABLE = (*TOKENIZER_FILES, "*.safetensors", "*.json", "*.log", "*.py", SIDECAR.parts[0])


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the result, and where it comes from."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def check_place(output: Path, original: Path) -> None:
    """Raises ConfigError where no result can lie, and where it would replace the original."""
    place, source = output.resolve(), original.resolve()
    if place == source or place in source.parents:
        raise ConfigError(f"{output} holds the original model; name another output")
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"{there} is no directory; name another output")
    if there != place and not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{output} cannot be made: {there} is not writable; name another output")


def check_replaceable(output: Path) -> None:
    """Raises ConfigError for a directory with anything in it that no quantization has written."""
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    known = {n for n in names for pattern in REPLACEABLE if fnmatch(n, pattern)}
    if strangers := sorted(names - known):
        raise ConfigError(
            f"{output} holds {strangers[0]}, which is of no quantized model; it is not "
            "overwritten: remove the directory yourself, or name another output"
        )


def is_filled(directory: Path) -> bool:
    """An empty directory, as Docker makes them for volumes, is in nobody's way."""
    return directory.is_dir() and any(directory.iterdir())


def write_directory(
    directory: Path,
    source: LanguageFiles,
    layer_files: Sequence[Path],
    quantization: Mapping[str, Any],
    shard_size: int,
) -> dict[str, str]:
    """Everything but the report; returns the digests of the tensors that no layer holds.

    Memory: one tensor at a time. Synced to the disk.
    """
    directory.mkdir()
    digests: dict[str, str] = {}
    pieces = [*_outside(source, digests), *_layers(layer_files)]
    write_shards(directory, sorted(pieces, key=_place), shard_size)
    write_configs(directory, source.raw, quantization)
    for file in source.tokenizer_files():
        shutil.copyfile(file, directory / file.name)
    sync_tree(directory)
    return digests


def write_sidecar(directory: Path, files: Sequence[Path]) -> None:
    """Salient columns, where no other loader looks: the model is whole without them."""
    target = directory / SIDECAR
    target.parent.mkdir()
    _write_shard(target, _layers(files))


def write_shards(directory: Path, pieces: Sequence[Piece], shard_size: int) -> None:
    """model.safetensors, or model-0000i-of-0000n.safetensors of at most `shard_size` and an index.

    A tensor that is larger than that has a file of its own.
    """
    shards = _shares(pieces, shard_size)
    if len(shards) == 1:
        _write_shard(directory / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_shard(directory / name, shard)
        weight_map |= {piece.name: name for piece in shard}
    total = sum(piece.size for piece in pieces)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX, index)


def write_configs(directory: Path, raw: Mapping[str, Any], quantization: Mapping[str, Any]) -> None:
    """config.json for servers, quant_config.json with the names AutoAWQ's own code uses."""
    config = {**raw, "torch_dtype": "float16", "quantization_config": dict(quantization)}
    if "dtype" in raw:  # the newer spelling, which wins where both are read
        config["dtype"] = "float16"
    write_json(directory / "config.json", config)
    renamed = {"group_size": "q_group_size", "bits": "w_bit"}
    names = {renamed.get(name, name): value for name, value in quantization.items()}
    if kept := quantization.get("modules_to_not_convert"):
        names["dynamic"] = left_out(kept)  # gptqmodel reads this file, and that name alone
    write_json(directory / "quant_config.json", names)


def quantization_config(scheme: Scheme, kept: Sequence[str], *, act_order: bool) -> dict[str, Any]:
    """What config.json says about the tensors.

    kept: full names of the linears that stayed float: parts of names mean different things to
    different servers (spec: quantization 7).
    """
    if scheme.layout == "gptq":
        return _gptq_config(scheme, kept, act_order)
    return {
        "quant_method": "awq",
        # symmetric codes are stored with zero points, too: no server reads a file without
        "zero_point": True,
        "group_size": scheme.group_size,
        "bits": scheme.bits,
        "version": scheme.layout,
        "modules_to_not_convert": list(kept) or None,
    }


def _gptq_config(scheme: Scheme, kept: Sequence[str], act_order: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "desc_act": act_order,
        "sym": True,
        "checkpoint_format": "gptq",
        "true_sequential": True,
        "lm_head": False,
    }
    if kept:
        config["modules_to_not_convert"] = list(kept)
        config["dynamic"] = left_out(kept)
    return config


def left_out(kept: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Full names of linears that stayed float -> gptqmodel's rules for them."""
    return {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in kept}


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    def write(target: Path) -> None:
        target.write_text(text, encoding="utf-8")

    replace_file(path, write)


def sync_tree(directory: Path) -> None:
    """Every file and directory below, and itself, is on the disk when this returns."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _layers(files: Iterable[Path]) -> list[Piece]:
    pieces = []
    for path in files:
        file = TensorFile(path)
        pieces += [
            Piece(name, entry.dtype, entry.shape, _reader(file, name))
            for name, entry in file.entries.items()
        ]
    return pieces


def _reader(file: TensorFile, name: str) -> Callable[[], Tensor]:
    return lambda: file.read(name)


def _outside(source: LanguageFiles, digests: dict[str, str]) -> list[Piece]:
    """Embeddings, last norm, head: float16, their digests taken as they are written."""

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            half = half_in_place(source.read(name, source.dtype(name)), name)
            digests[name] = tensor_digest(half)
            return half

        return read

    return [
        Piece(name, torch.float16, source.shape(name), reader(name))
        for name in source.outside_names()
    ]


def _place(piece: Piece) -> tuple[int, int, str]:
    """In the order of the model, so that a shard holds neighbours."""
    parts = piece.name.split(".")
    if piece.name.startswith("model.layers."):
        return 1, int(parts[2]), piece.name
    return (2 if piece.name in HEAD else 0), 0, piece.name


def _shares(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    shares: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shares[-1] and size + piece.size > limit:
            shares.append([])
            size = 0
        shares[-1].append(piece)
        size += piece.size
    return shares


def _write_shard(path: Path, pieces: Sequence[Piece]) -> None:
    layout = {piece.name: (piece.dtype, piece.shape) for piece in pieces}
    readers = {piece.name: piece.read for piece in pieces}
    write_tensor_file(path, layout, lambda name: readers[name]())
