"""Quality of the methods on the byte models: divergence from the float model, over several seeds.

Every method hears the same calibration sequences and is judged on the same held-out text.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from benchmarks.byte_lm import ByteLM
from benchmarks.corpus import pieces
from benchmarks.divergence import Divergence, divergence
from omnispeech.models.qwen3 import Block
from omnispeech.quantization.method import LinearReport
from omnispeech.quantization.methods.layer_quantizer import build_method
from omnispeech.quantization.methods.settings import MethodSettings

LENGTH = 128
EVALUATION_SEED = 10**6

METHODS: Mapping[str, MethodSettings] = {
    "plain rounding": MethodSettings(method="rtn", compatible=True, group_size=64),
    "AutoAWQ recipe": MethodSettings(compatible=True, compatible_dtype="float32", group_size=64),
    "AWQ, plain rounding": MethodSettings(rounding="rtn", group_size=64),
    "GPTQ": MethodSettings(method="gptq", bits=4, group_size=64),
    "default": MethodSettings(group_size=64),
    "default, passes=4": MethodSettings(group_size=64, passes=4),
}
GROUPS = {
    "attention inputs": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention output": ("self_attn.o_proj",),
    "MLP inputs": ("mlp.gate_proj", "mlp.up_proj"),
    "MLP output": ("mlp.down_proj",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is spent on the figures."""

    seeds: int = 3
    calibration: int = 48  # sequences
    evaluation: int = 192


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One method on one model with one calibration seed."""

    divergence: Divergence
    worse_groups: int  # module groups with a larger error than plain rounding
    groups: int
    seconds: float  # of quantizing


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Inputs nobody calibrated on, and what the float model makes of them."""

    vectors: Tensor  # [B, T, D]
    targets: Tensor  # [B, T]
    counted: Tensor  # [B, T] bool
    exact: Tensor  # [B, T, V]


def held_out_text(model: ByteLM, effort: Effort) -> HeldOut:
    ids = pieces("evaluation", effort.evaluation, LENGTH + 1, EVALUATION_SEED)
    vectors = model.embed(ids[:, :-1])
    counted = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    return HeldOut(vectors, ids[:, 1:], counted, model.logits(model.blocks(), vectors))


def calibration_text(model: ByteLM, effort: Effort, seed: int) -> Tensor:
    """[B, T, D]"""
    return model.embed(pieces("calibration", effort.calibration, LENGTH, seed))


def judge(model: ByteLM, method: MethodSettings, heard: Tensor, held_out: HeldOut) -> Judged:
    began = time.perf_counter()
    blocks, reports = quantize(model, method, heard)
    seconds = time.perf_counter() - began
    groups = [group for report in reports for group in group_losses(report)]
    return Judged(
        divergence=divergence(
            held_out.exact,
            model.logits(blocks, held_out.vectors),
            held_out.targets,
            held_out.counted,
        ),
        worse_groups=sum(loss > nearest for loss, nearest in groups),
        groups=len(groups),
        seconds=seconds,
    )


def quantize(
    model: ByteLM, settings: MethodSettings, heard: Tensor
) -> tuple[list[Block], list[Mapping[str, LinearReport]]]:
    """The layer loop of the pipeline, in memory: blocks compute what would be stored."""
    method = build_method(settings)
    floats, quantized = model.stream(heard), model.stream(heard)
    blocks, reports = model.blocks(), []
    for block, exact in zip(blocks, model.blocks(), strict=True):
        reports.append(method.quantize(block, floats, quantized).linears)
        floats.advance(exact)
        quantized.advance(block)
    return blocks, reports


def group_losses(linears: Mapping[str, LinearReport]) -> Iterator[tuple[float, float]]:
    """Error of each module group and of plain rounding in its place, over its linears."""
    for names in GROUPS.values():
        reports = [linears[name] for name in names]
        yield fmean(r.loss for r in reports), fmean(r.nearest_loss for r in reports)


def over_seeds(
    model: ByteLM, method: MethodSettings, effort: Effort, held_out: HeldOut
) -> list[Judged]:
    return [
        judge(model, method, calibration_text(model, effort, seed), held_out)
        for seed in range(effort.seeds)
    ]


def mean_kl(judged: Sequence[Judged]) -> float:
    return fmean(j.divergence.kl for j in judged)


def spread_kl(judged: Sequence[Judged]) -> float:
    """Standard deviation over the seeds; 0 for one."""
    values = [j.divergence.kl for j in judged]
    return stdev(values) if len(values) > 1 else 0.0
