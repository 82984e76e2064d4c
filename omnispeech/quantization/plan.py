"""What a run will write, and whether it can: shapes, memory, disk and time.

Everything that can be known to fail is found here, before the first hour of work
(spec: quantization 5.2 and 7).
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from omnispeech.calibration.samples import Calibration
from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.layers.packing import Scheme, packed_dtypes, packed_shapes
from omnispeech.quantization.memory import (
    available_memory,
    free_memory,
    freeing_advice,
    resident_memory,
)
from omnispeech.quantization.methods.layer_quantizer import TRIAL_TOKENS
from omnispeech.quantization.methods.settings import GROUP_SIZES, MethodSettings
from omnispeech.quantization.progress import duration
from omnispeech.quantization.run_settings import RunSettings
from omnispeech.quantization.selection import kept_modules, kept_text, layer_linears, split_sets
from omnispeech.quantization.state import partial_path

MARLIN_GROUPS = (-1, 32, 64, 128)
MARLIN_K, MARLIN_N = 128, 64  # what its tiles cover
HALF, FLOAT = 2, 4  # bytes
# Products of each linear [N, K] with all calibration tokens, and with a [K, K] matrix, that would
# take as long as the method: measured on small models, so the time is an estimate.
PRODUCTS = {"awq": (24, 60), "gptq": (20, 16), "rtn": (12, 6)}
GRAMS = {"awq": 2, "gptq": 2, "rtn": 1}  # float32 [K, K] of the widest linear that live at once
LIBRARIES = 64 << 20  # bytes that the first matrix products load
PROBE = 512  # side of the matrices whose product is timed


@dataclass(frozen=True, slots=True)
class Work:
    """Sizes of the calibration."""

    tokens: int
    longest: int  # tokens of the longest sequence


def work_of(calibration: Calibration) -> Work:
    lengths = [len(sample.vectors) for sample in calibration.samples]
    return Work(sum(lengths), max(lengths, default=0))


@dataclass(frozen=True, slots=True)
class Conversion:
    """What becomes of the linears."""

    scheme: Scheme
    kept: tuple[str, ...]  # full names of those that stay float


@dataclass(frozen=True, slots=True)
class Need:
    what: str
    size: int  # bytes
    available: int

    def __str__(self) -> str:
        return f"{self.what} {size_text(self.size)} of {size_text(self.available)} free"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    conversion: Conversion
    layers: int
    work: Work
    peak_ram: int  # bytes of the whole process
    needs: tuple[Need, ...]  # beyond what is taken already
    seconds: float
    result_size: int  # bytes of tensors
    float_size: int  # of the same model in 16 bits

    def lines(self) -> list[str]:
        s = self.conversion.scheme
        share = self.result_size / self.float_size
        return [
            f"layout {s.layout}, {s.bits} bits, group size {s.group_size}, {self.layers} layers",
            f"kept in float16: {kept_text(self.conversion.kept)}",
            f"calibration: {self.work.tokens} tokens, the longest sequence {self.work.longest}",
            *(f"needs {need}" for need in self.needs),
            f"result {size_text(self.result_size)}, {share:.0%} of 16 bits",
            f"time about {duration(self.seconds)}",
        ]


def plan_conversion(
    source: LanguageFiles, method: MethodSettings, settings: RunSettings
) -> Conversion:
    """Raises ConfigError, with everything that is in the way and what to change."""
    scheme = Scheme(layout_of(method, settings), method.bits, method.group_size)
    layers = source.config.num_hidden_layers
    kept = kept_modules(
        layers, settings.keep_fp_layers, settings.modules_to_not_convert, source.outside_names()
    )
    problems = [
        *_layout_problems(scheme, method),
        *_target_problems(scheme, settings.target),
        *_shape_problems(source, scheme, settings.target, kept),
        *_split_problems(layers, kept),
        *_empty_problems(layers, source, kept),
    ]
    if problems:
        raise ConfigError("the model cannot be quantized like this: " + "; ".join(problems))
    return Conversion(scheme, kept)


def make_plan(
    source: LanguageFiles,
    work: Work,
    method: MethodSettings,
    settings: RunSettings,
    output: Path,
) -> Plan:
    """Raises ConfigError for what cannot be converted, and for what does not fit the machine."""
    if not work.tokens:
        raise ConfigError("there are no calibration tokens; give texts or sound to listen to")
    conversion = plan_conversion(source, method, settings)
    sizes = _Sizes(source, conversion)
    device = torch.device(settings.device)
    host, on_device = _memory(source, work, method, settings)
    needs = [Need("memory", host, available_memory()), _disk(sizes, source, work, output)]
    if device.type == "cuda":
        needs.append(Need("device memory", on_device, free_memory(device)))
    _refuse_what_does_not_fit(needs, device)
    return Plan(
        conversion=conversion,
        layers=source.config.num_hidden_layers,
        work=work,
        peak_ram=resident_memory() + host,
        needs=tuple(needs),
        seconds=_seconds(source, work, method, device),
        result_size=sizes.layers + sizes.outside,
        float_size=sizes.original,
    )


def layout_of(method: MethodSettings, settings: RunSettings) -> str:
    """8 bit is always GPTQ's: no server reads 8-bit AWQ (spec: quantization 0.6)."""
    if settings.layout is not None:
        return settings.layout
    return "gptq" if method.method == "gptq" or method.bits == 8 else "gemm"


def _layout_problems(scheme: Scheme, method: MethodSettings) -> Iterator[str]:
    if scheme.layout == "gptq" and not method.symmetric:
        yield "layout gptq has no zero points; use --no-zero-point or --layout gemm"
    if scheme.layout != "gptq" and method.act_order and not method.fixed_groups:
        yield (
            f"layout {scheme.layout} cannot say which group a column is of; use --layout gptq, "
            "--static-groups, or drop --desc-act"
        )


def _target_problems(scheme: Scheme, target: str) -> Iterator[str]:
    if target == "torch":
        return
    if scheme.layout not in ("gemm", "gptq"):
        yield f"target {target} reads no {scheme.layout}; use --layout gemm"
    if scheme.group_size not in MARLIN_GROUPS:
        allowed = ", ".join(map(str, MARLIN_GROUPS))
        yield (
            f"target {target} runs group sizes {allowed}, not {scheme.group_size}; "
            "change the group size or use --target torch"
        )


def _shape_problems(
    source: LanguageFiles, scheme: Scheme, target: str, kept: Sequence[str]
) -> list[str]:
    """One for each shape that does not go, with how many linears have it."""
    found: dict[str, list[str]] = {}
    for name in _converted(source, kept):
        n, k = source.shape(f"{name}.weight")
        try:
            packed_shapes(scheme, n, k)
        except CheckpointError as exc:
            found.setdefault(str(exc), []).append(name)
        if target != "torch" and (k % MARLIN_K or n % MARLIN_N):
            text = (
                f"target {target} runs linears of a multiple of {MARLIN_K} inputs and {MARLIN_N} "
                f"outputs, not {k} and {n}; use --target torch"
            )
            found.setdefault(text, []).append(name)
    problems = [
        f"{text} ({names[0]}" + (f" and {len(names) - 1} more)" if len(names) > 1 else ")")
        for text, names in found.items()
    ]
    if problems and (sizes := _fitting_groups(source, scheme, kept)):
        problems.append(f"group sizes that go: {', '.join(map(str, sizes))}")
    return problems


def _fitting_groups(source: LanguageFiles, scheme: Scheme, kept: Sequence[str]) -> list[int]:
    shapes = {source.shape(f"{name}.weight") for name in _converted(source, kept)}

    def fits(size: int) -> bool:
        try:
            for n, k in shapes:
                packed_shapes(replace(scheme, group_size=size), n, k)
        except CheckpointError:
            return False
        return True

    return [] if fits(scheme.group_size) else [size for size in GROUP_SIZES if fits(size)]


def _split_problems(layers: int, kept: Sequence[str]) -> list[str]:
    """Servers compute linears that read the same vectors as one, so they are kept together."""
    split = split_sets(layers, kept)
    if not split:
        return []
    return [
        f"of {', '.join(split[0])} some are to be kept in float16 and some not"
        + (f", and so in {len(split) - 1} more sets" if len(split) > 1 else "")
        + "; they read the same vectors: name all of them or none"
    ]


def _empty_problems(layers: int, source: LanguageFiles, kept: Sequence[str]) -> Iterator[str]:
    """Loaders take a file that calls itself quantized and is not for damaged."""
    if not _converted(source, kept):
        yield f"all {layers} layers are kept in float16; keep fewer with --keep-fp-layers"


def _converted(source: LanguageFiles, kept: Sequence[str]) -> list[str]:
    left_out = set(kept)
    layers = range(source.config.num_hidden_layers)
    return [name for i in layers for name in layer_linears(i) if name not in left_out]


class _Sizes:
    """Bytes of tensors of the result."""

    def __init__(self, source: LanguageFiles, conversion: Conversion) -> None:
        count = source.config.num_hidden_layers
        inside = [name for i in range(count) for name in source.layer_names(i)]
        converted = {f"{name}.weight" for name in _converted(source, conversion.kept)}
        self.layers = sum(
            _packed_size(conversion.scheme, *source.shape(name))
            if name in converted
            else _elements(source, name) * HALF
            for name in inside
        )
        self.outside = sum(_elements(source, name) * HALF for name in source.outside_names())
        self.original = self.outside + sum(_elements(source, name) * HALF for name in inside)


def _packed_size(scheme: Scheme, n: int, k: int) -> int:
    types = packed_dtypes(scheme)
    shapes = packed_shapes(scheme, n, k)
    return sum(torch.Size(shapes[s]).numel() * types[s].itemsize for s in types)


def _elements(source: LanguageFiles, name: str) -> int:
    return torch.Size(source.shape(name)).numel()


def _memory(
    source: LanguageFiles, work: Work, method: MethodSettings, settings: RunSettings
) -> tuple[int, int]:
    """Bytes on the host beyond what is taken, and on a CUDA device."""
    c = source.config
    shapes = [source.shape(f"{name}.weight") for name in layer_linears(0)]
    layer = sum(n * k for n, k in shapes)
    largest = max(n * k for n, k in shapes)
    square = max(k for _, k in shapes) ** 2
    # the layer before and after, candidates of its largest linears, what statistics and rounding
    # keep, and tokens that candidates are tried on
    computing = FLOAT * (2 * layer + 2 * largest + GRAMS[method.method] * square)
    computing += FLOAT * 2 * min(work.tokens, TRIAL_TOKENS) * c.hidden_size
    together = max(settings.batch_tokens, work.longest)
    computing += FLOAT * together * (6 * c.hidden_size + 4 * c.intermediate_size)
    if method.compatible:  # AutoAWQ's recipe keeps what every linear reads
        computing += FLOAT * work.tokens * sum(k for _, k in shapes)
    states = 3 * work.tokens * c.hidden_size * stream_dtype(source).itemsize
    packing = layer + FLOAT * largest  # codes of a byte, and one linear's words
    outside = max(
        (_elements(source, n) * source.dtype(n).itemsize for n in source.outside_names()), default=0
    )
    if torch.device(settings.device).type == "cuda":
        return LIBRARIES + max(states + packing, outside), computing
    return LIBRARIES + max(states + packing + computing, outside), 0


def stream_dtype(source: LanguageFiles) -> torch.dtype:
    """Of the hidden states that are kept: as exact as the model itself."""
    return torch.bfloat16 if source.stored_dtype == torch.bfloat16 else torch.float32


def _disk(sizes: _Sizes, source: LanguageFiles, work: Work, output: Path) -> Need:
    """Finished layers stay until the result is verified; the states are written beside the old."""
    states = 2 * work.tokens * source.config.hidden_size * stream_dtype(source).itemsize
    total = 2 * sizes.layers + sizes.outside + 2 * states
    partial = partial_path(output)
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    folder = next(path for path in partial.absolute().parents if path.is_dir())
    return Need("disk", max(0, total - there), shutil.disk_usage(folder).free)


def _refuse_what_does_not_fit(needs: Sequence[Need], device: torch.device) -> None:
    def advice(what: str) -> str:
        if what == "device memory":
            return f"{freeing_advice(device)}, or a smaller --batch-tokens"
        return {
            "memory": "use fewer calibration tokens (--max-tokens) or a smaller --batch-tokens",
            "disk": "make room, or name an output on another disk",
        }[what]

    short = [f"{need}: {advice(need.what)}" for need in needs if need.size > need.available]
    if short:
        raise ConfigError("there is not enough room; needed: " + "; ".join(short))


def _seconds(
    source: LanguageFiles, work: Work, method: MethodSettings, device: torch.device
) -> float:
    of_tokens, of_squares = PRODUCTS[method.method]
    shapes = [source.shape(f"{name}.weight") for name in layer_linears(0)]
    layer = sum(2 * n * k * (of_tokens * work.tokens + of_squares * k) for n, k in shapes)
    return source.config.num_hidden_layers * layer / _speed(device)


def _speed(device: torch.device) -> float:
    """Floating-point operations a second of a float32 matrix product, tried out."""
    side = PROBE if device.type == "cpu" else 8 * PROBE
    a = torch.ones(side, side, device=device)
    torch.mm(a, a).sum().item()  # the first one loads the library
    began = time.perf_counter()
    torch.mm(a, a).sum().item()
    return 2 * side**3 / (time.perf_counter() - began)
