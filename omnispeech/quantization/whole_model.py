"""The whole OpenS2S model in 8 bits: a directory that needs nothing of the original any more.

The linears of the decoder layers of both language models become whole numbers with one float16
scale for each row, rounded to nearest; every other tensor and file is taken over as it is, LoRA
merged. Tensors pass one by one: what is resident is the largest of them, not the model.
"""

import hashlib
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.lora import merged
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.shards import Shards, TensorFiles
from omnispeech.checkpoint.tensor_file import Layout
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.json_file import read_json
from omnispeech.layers.packing import (
    QuantizedWeight,
    Scheme,
    pack,
    packed_dtypes,
    packed_shapes,
    unpack,
)
from omnispeech.quantization.output import Piece, sync_tree, write_json, write_shards
from omnispeech.quantization.selection import LINEARS
from omnispeech.quantization.state import WorkDirectory, give_name, put_back

KEY = "omnispeech_quantization"  # of config.json
SCHEME = Scheme("int8", 8, -1)
MIDDLE, LARGEST = 128, 127  # code of zero; steps on either side of it that are used
SHARD_SIZE = 4 * 10**9  # bytes of tensors in one file
ALLOWED = 0.5001  # steps a weight may be off: half a step, and the last bit of float32
CPU = torch.device("cpu")

LINEAR = re.compile(
    r"(?P<module>(?:llm_model|tts_lm_model)\.model\.layers\.\d+\."
    rf"(?:{'|'.join(map(re.escape, LINEARS))}))\.weight"
)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt")

Progress = Callable[[str, int, int], None]  # what is being done, bytes so far, bytes in all


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeModel:
    """What was written, measured from the files themselves."""

    quantized: int  # linears
    source_size: int  # bytes of all files of the original
    size: int  # bytes of all files here
    codes: int  # bytes of the 8-bit linears with their scales
    error: float  # largest deviation of a weight, in steps of its row; rounding allows 0.5


class EightBit:
    """The tensors of the 8-bit checkpoint, made from those of the original when asked for."""

    def __init__(self, source: TensorFiles) -> None:
        self._source = source
        self.linears = {
            match["module"]: name for name in source.names if (match := LINEAR.fullmatch(name))
        }
        self.copied = sorted(set(source.names) - set(self.linears.values()))
        self._modules: dict[str, str] = {}  # name of a packed tensor -> its linear
        self.layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name in sorted(source.names):
            self.layout |= self._planned(name)

    def read(self, name: str) -> Tensor:
        """Raises CheckpointError for a weight that is not finite, or that 8 bits cannot hold."""
        if name not in self._modules:
            return self._source.read(name, CPU, self._source.dtype(name))
        module = self._modules[name]
        weight = self.original(module)
        if name == f"{module}.scales":  # they are in front of the codes in a file
            return row_scales(weight, module)
        return pack(quantize_rows(weight, module), SCHEME)["qweight"]

    def original(self, module: str) -> Tensor:
        """[N, K] float32"""
        return self._source.read(self.linears[module], CPU, torch.float32)

    def parts(self, name: str) -> tuple[str, ...]:
        """Tensors that a linear is stored as; of any other name, itself."""
        if name not in self.linears:
            return (name,)
        return tuple(f"{name}.{suffix}" for suffix in packed_dtypes(SCHEME))

    def _planned(self, name: str) -> Layout:
        shape = self._source.shape(name)
        match = LINEAR.fullmatch(name)
        if match is None:
            return {name: (self._source.dtype(name), shape)}
        if not self._source.dtype(name).is_floating_point or len(shape) != 2:
            raise CheckpointError(
                f"{name} is {self._source.dtype(name)} {list(shape)} and no matrix of numbers "
                "with a point; the original must not be quantized already"
            )
        shapes, dtypes = packed_shapes(SCHEME, *shape), packed_dtypes(SCHEME)
        planned = {f"{match['module']}.{suffix}": suffix for suffix in shapes}
        self._modules |= dict.fromkeys(planned, match["module"])
        return {full: (dtypes[suffix], shapes[suffix]) for full, suffix in planned.items()}


def quantize_rows(weight: Tensor, name: str) -> QuantizedWeight:
    """[N, K] float32 -> 8 bits, symmetric, one scale for each row, rounded to nearest.

    `name` is for the errors of `row_scales`.
    """
    scales = row_scales(weight, name)
    steps = (weight / scales.float()).round_().clamp_(-LARGEST, LARGEST)
    return QuantizedWeight(
        codes=steps.add_(MIDDLE).to(torch.uint8),
        zeros=torch.full_like(scales, MIDDLE, dtype=torch.uint8),
        scales=scales,
        bits=8,
    )


def row_scales(weight: Tensor, name: str) -> Tensor:
    """[N, K] -> [N, 1] float16, rounded up.

    So the largest weight of a row keeps its place, and no weight is more than half a step away.
    Raises CheckpointError, with `name`, for a weight that is not finite or too large.
    """
    low, high = weight.aminmax(dim=1, keepdim=True)  # [N, 1]
    largest = torch.maximum(-low, high)
    if not largest.isfinite().all():
        row = int((~largest.isfinite()).nonzero()[0, 0])
        raise CheckpointError(f"row {row} of {name}.weight is not finite; fetch the model again")
    scales = (largest / LARGEST).half()
    below = scales.float() * LARGEST < largest
    scales = torch.where(below | (scales == 0), _next_up(scales), scales)
    if not scales.isfinite().all():
        raise CheckpointError(
            f"{name}.weight reaches {largest.max().item():g}; 8 bits with a "
            "float16 scale hold up to 8e6"
        )
    return scales


def _next_up(scales: Tensor) -> Tensor:
    """The next larger float16 of numbers that are not negative."""
    return (scales.view(torch.int16) + 1).view(torch.float16)


def make_whole_model(
    source: Path, target: Path, progress: Progress, *, overwrite: bool = False
) -> WholeModel:
    """The 8-bit model at `target`: whole, verified and entered in the manifest, or not there.

    An older one stays until the new one is whole. What an interrupted run has left is removed.
    Raises ConfigError where `target` is there and `overwrite` is not set.
    """
    Manifest(target.parent).names()  # one that cannot be read is told before the work
    put_back(target)
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} is there already; add --overwrite to make it again")
    with WorkDirectory.open(target, {"scheme": asdict(SCHEME)}, restart=True) as work:
        made = write_whole_model(source, work.result, progress)
        give_name(work.result, target)
        work.remove()
    how = {"by": "quantize_model_once.py", "source": source_fingerprint(source), **asdict(SCHEME)}
    Manifest(target.parent).enter(target.name, how)
    return made


def source_fingerprint(source: Path) -> str:
    """sha256 over config.json, headers, file sizes and the first bytes of each tensor."""
    digest = hashlib.sha256((source / "config.json").read_bytes())
    for part in Shards(source, CPU).identity():
        digest.update(part)
    return digest.hexdigest()


def write_whole_model(source: Path, target: Path, progress: Progress) -> WholeModel:
    """Writes the model of `source` in 8 bits to the new directory `target`, and reads it back.

    Raises CheckpointError for an original that is not whole, for a disk that is too small, and for
    a tensor that does not come back as it was meant.
    """
    raw = read_json(source / "config.json")
    if KEY in raw:
        raise CheckpointError(f"{source} is in 8 bits already; name the original")
    tensors = EightBit(merged(Shards(source, CPU), source, raw))
    if not tensors.linears:
        raise CheckpointError(
            f"{source} has no decoder layers of llm_model or tts_lm_model; is it an OpenS2S model?"
        )
    _check_room(target.parent, _size_of(tensors.layout))
    target.mkdir()
    _copy_companions(source, target)
    write_json(target / "config.json", {**raw, "lora_config": None, KEY: asdict(SCHEME)})
    write_shards(target, _pieces(tensors, progress), SHARD_SIZE)
    for folder in (path for path in target.rglob("*") if path.is_dir()):
        sync_tree(folder)
    sync_tree(target)
    return WholeModel(
        quantized=len(tensors.linears),
        source_size=directory_size(source),
        size=directory_size(target),
        codes=sum(_size(*tensors.layout[p]) for m in tensors.linears for p in tensors.parts(m)),
        error=verify_whole_model(tensors, target, progress),
    )


def verify_whole_model(tensors: EightBit, directory: Path, progress: Progress) -> float:
    """Compares every tensor on disk with the original; gives the largest error of a weight.

    In steps of its row. Raises CheckpointError for a tensor that is missing, of another type or
    shape, further off than half a step, or not taken over bit by bit.
    """
    files = Shards(directory, CPU)
    stored = {name: (files.dtype(name), files.shape(name)) for name in files.names}
    if wrong := sorted(name for name in stored | tensors.layout if _differs(stored, tensors, name)):
        raise CheckpointError(f"{directory} was not written as planned: {', '.join(wrong[:3])}")
    worst, done, total = 0.0, 0, _size_of(tensors.layout)
    for module in tensors.linears:
        worst = max(worst, _check_linear(tensors, files, module, directory))
        done += sum(_size(*tensors.layout[name]) for name in tensors.parts(module))
        progress("verified", done, total)
    for name in tensors.copied:
        expected, found = tensors.read(name), files.read(name, CPU, files.dtype(name))
        if not torch.equal(_bytes(expected), _bytes(found)):
            raise CheckpointError(f"{name} of {directory} is not what was read; is the disk sound?")
        done += _size(*tensors.layout[name])
        progress("verified", done, total)
    return worst


def _check_linear(tensors: EightBit, files: Shards, module: str, directory: Path) -> float:
    parts = packed_dtypes(SCHEME)
    weight = unpack({s: files.read(f"{module}.{s}", CPU, parts[s]) for s in parts}, SCHEME)
    steps = weight.dequantize().sub_(tensors.original(module)).div_(weight.scales.float())
    worst = max(abs(end.item()) for end in steps.aminmax())  # of [N, K]
    if not worst <= ALLOWED:
        raise CheckpointError(
            f"{module}.weight of {directory} is {worst:.3g} steps from the original; rounding "
            "allows 0.5: is the disk sound?"
        )
    return worst


def _differs(stored: Layout, tensors: EightBit, name: str) -> bool:
    return stored.get(name) != tensors.layout.get(name)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _check_room(directory: Path, needed: int) -> None:
    if (free := shutil.disk_usage(directory).free) < needed:
        raise CheckpointError(
            f"the 8-bit model takes {size_text(needed)}, {directory} has {size_text(free)} left; "
            "make room there"
        )


def _copy_companions(source: Path, target: Path) -> None:
    """Tokenizers, preprocessor, settings, licence: every file that holds no weights."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        weights = any(fnmatch(path.name, pattern) for pattern in WEIGHTS)
        if path.is_file() and not hidden and not weights:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def _pieces(tensors: EightBit, progress: Progress) -> list[Piece]:
    total, done = _size_of(tensors.layout), 0

    def read(name: str) -> Tensor:
        nonlocal done
        done += _size(*tensors.layout[name])
        tensor = tensors.read(name)
        progress("written", done, total)
        return tensor

    names = sorted(tensors.layout, key=_in_order)
    return [Piece(name, *tensors.layout[name], partial(read, name)) for name in names]


def _in_order(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10, so that a file holds neighbours."""
    return [(int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _size_of(layout: Layout) -> int:
    return sum(_size(*entry) for entry in layout.values())


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def directory_size(directory: Path) -> int:
    """Bytes of all files of a model, those of the hub's cache and partial ones not counted."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return sum(
        path.stat().st_size
        for path in files
        if not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )
