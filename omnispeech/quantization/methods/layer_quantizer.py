"""The methods: channel scales, rounding and a look back, for one decoder layer at a time."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnispeech.errors import CheckpointError
from omnispeech.layers.packing import QuantizedWeight
from omnispeech.models.qwen3 import Block
from omnispeech.quantization.method import LayerResult, LinearReport, Method
from omnispeech.quantization.methods.autoawq import AutoAwq
from omnispeech.quantization.methods.branches import BRANCHES, Branch, Trial, linear
from omnispeech.quantization.methods.gptq import (
    compensate,
    compensate_in_turn,
    factorize,
    groups_in_order,
    split_rows,
)
from omnispeech.quantization.methods.grid import Grid, Rule
from omnispeech.quantization.methods.refine import refine
from omnispeech.quantization.methods.salient import SalientColumns, describe, residual_columns
from omnispeech.quantization.methods.scales import (
    Search,
    final_fit,
    fold_into_norm,
    fold_into_rows,
)
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.methods.statistics import (
    Moments,
    check_weights,
    observe,
    relative_losses,
)
from omnispeech.quantization.stream import Stream

STORED = torch.float16  # norms and biases of the written model
TRIAL_TOKENS = 8192  # tokens that finalists and the result are judged on


def build_method(settings: MethodSettings) -> Method:
    if settings.compatible:
        return AutoAwq(settings)
    return LayerQuantizer(settings)


@dataclass(slots=True, eq=False)
class Outcome:
    """One branch, quantized."""

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    linears: dict[str, LinearReport] = field(default_factory=dict)
    salient: dict[str, SalientColumns] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Plan:
    scaled: bool
    compensated: bool
    note: str = ""

    @property
    def plain(self) -> bool:
        return self.note == "nearest"


class LayerQuantizer:
    """AWQ, GPTQ and plain rounding: they differ in the scale search and in how they round."""

    def __init__(self, settings: MethodSettings) -> None:
        self.settings = settings

    @torch.no_grad()
    def quantize(
        self, block: Block, floats: Stream, quantized: Stream, kept: Collection[str] = ()
    ) -> LayerResult:
        check_weights(block)
        _store_plain(block, [name for branch in BRANCHES for name in branch.linears])
        outcomes = [
            _BranchWork(self.settings, block, branch, quantized, kept).outcome()
            for branch in BRANCHES
        ]
        weights = {name: w for outcome in outcomes for name, w in outcome.weights.items()}
        return LayerResult(
            weights=weights,
            plain=_store_plain(block, weights),
            linears={name: r for outcome in outcomes for name, r in outcome.linears.items()},
            salient={name: s for outcome in outcomes for name, s in outcome.salient.items()},
        )


class _BranchWork:
    """One branch of one layer: what was asked for is kept unless plain rounding is better."""

    def __init__(
        self,
        settings: MethodSettings,
        block: Block,
        branch: Branch,
        stream: Stream,
        kept: Collection[str],
    ) -> None:
        self.settings, self.block, self.branch, self.stream = settings, block, branch, stream
        self.readers = tuple(name for name in branch.readers if name not in kept)
        self.last = tuple(name for name in (branch.last,) if name not in kept)
        self.rule = Rule(settings.bits, settings.group_size, settings.symmetric)
        self.floats = {n: p.detach().clone() for n, p in branch.parameters(block)}
        self.trial = Trial(block, branch, stream, TRIAL_TOKENS)
        self._listen()

    def outcome(self) -> Outcome:
        if not (names := (*self.readers, *self.last)):
            return Outcome()
        floats = [(name, self._float(name)) for name in names]
        plain = self.trial.loss_with({name: self.rule.widest(w).nearest(w) for name, w in floats})
        for plan in self._plans():
            outcome = self._attempt(plan)
            last = [outcome.linears[name] for name in self.last]
            no_worse = self.trial.loss() <= plain and all(r.loss <= r.nearest_loss for r in last)
            if plan.plain or no_worse:
                return outcome
            self._start_again()
        raise AssertionError("the last plan is always kept")

    def _plans(self) -> list[_Plan]:
        s = self.settings
        compensated = s.rounds == "gptq"
        plans = [_Plan(s.method == "awq", compensated)]
        if s.method == "awq":
            plans.append(_Plan(False, compensated, "no scales: plain rounding was better"))
        return [*plans, _Plan(False, False, "nearest")]

    def _attempt(self, plan: _Plan) -> Outcome:
        b = self.branch
        self.notes: dict[str, dict[str, Any]] = {n: {} for n in b.linears}
        if plan.note:
            for notes in self.notes.values():
                notes["fallback"] = plan.note
        if plan.scaled and self.readers:
            self._scale_readers()
        if plan.scaled and self.last:
            self._scale_last()
        outcome = Outcome()
        self._round(self.readers, plan, outcome)
        if plan.compensated and self.readers and self.last:
            del self.moments[b.last]
            # the last linear makes good what the readers lost, too
            self.moments |= observe(self.block, b, self.stream, [b.last])
        self._round(self.last, plan, outcome)
        return outcome

    def _listen(self) -> None:
        b = self.branch
        self.moments = observe(self.block, b, self.stream, [b.readers[0], b.last])
        heard = {name: m.magnitude.clone() for name, m in self.moments.items()}
        self.heard = {name: heard.get(name, heard[b.readers[0]]) for name in b.linears}
        self.columns = {n: torch.ones_like(self._float(n)[0]) for n in b.linears}  # multiplied by
        self.rows = {n: torch.ones_like(self._float(n)[:, :1]) for n in b.linears}  # divided by

    def _start_again(self) -> None:
        for name, parameter in self.branch.parameters(self.block):
            parameter.copy_(self.floats[name])
        self._listen()

    def _float(self, name: str) -> Tensor:
        return self.floats[f"{name}.weight"]

    def _scale_readers(self) -> None:
        names = self.branch.readers
        moments = self.moments[names[0]]
        tie = torch.arange(len(moments.magnitude), device=moments.magnitude.device)
        search = Search([self._float(n) for n in names], moments, self.settings, tie)
        choice = search.best_of_true(self.trial, names)
        scales = fold_into_norm(self.block, self.branch, choice.scales, STORED)
        moments.divide(scales)
        for name in names:
            self.columns[name] = scales
            self.notes[name] |= choice.describe()

    def _scale_last(self) -> None:
        b = self.branch
        moments = self.moments[b.last]
        tie = b.tie(self.block).to(moments.magnitude.device)
        choice = Search([self._float(b.last)], moments, self.settings, tie).best()
        fold_into_rows(self.block, b, choice.scales, tie, STORED)
        moments.divide(choice.scales[tie])
        self.columns[b.last] = choice.scales[tie]
        self.rows[b.before] = choice.scales[:, None]
        self.notes[b.last] |= choice.describe()

    def _round(self, names: Sequence[str], plan: _Plan, outcome: Outcome) -> None:
        """Linears that read the same thing are rounded as one."""
        if not names:
            return
        moments = self.moments[names[0]]
        parts = [linear(self.block, name).weight for name in names]
        w = torch.cat(list(parts)) if len(parts) > 1 else parts[0].detach()
        codes, grid, group_of, notes = self._codes(w, moments, plan)
        for name, (own, part) in zip(
            names, split_rows(grid, codes, [len(p) for p in parts]), strict=True
        ):
            self.notes[name] |= notes
            outcome.weights[name] = part.weight(own, group_of)
            linear(self.block, name).weight.copy_(outcome.weights[name].dequantize())
            self._judge(name, moments, outcome)

    def _codes(
        self, w: Tensor, moments: Moments, plan: _Plan
    ) -> tuple[Tensor, Grid, Tensor | None, dict[str, Any]]:
        """Codes [N, K], their grid, the group of each column if not neighbours, notes."""
        s = self.settings
        fit = self.rule.widest(w)
        if not plan.plain:
            fit = final_fit(s, self.rule)(w, moments.gram)
        codes, grid, group_of = fit.codes(w), fit, None
        notes: dict[str, Any] = {}
        if plan.compensated:
            factor = factorize(moments.gram, by_activation=s.act_order, damping=s.damping)
            if factor is None:
                notes["rounding"] = "nearest: no damping made the Gram matrix definite"
            elif s.fixed_groups:
                notes["damping"] = factor.damping
                codes = compensate(w, factor, fit)
            else:
                notes["damping"] = factor.damping
                codes, grid = compensate_in_turn(w, factor, self.rule)
                group_of = groups_in_order(factor.order, w.shape[1] // grid.scales.shape[1])
            del factor
        if s.passes > 1 and not plan.plain:
            known = group_of if group_of is not None else self._neighbours(w, grid)
            better = refine(
                w, moments.gram, codes, grid, group_of=known.long(), passes=s.passes - 1
            )
            codes, grid = better.codes, better.grid
            notes |= {"passes": len(better.losses), "losses": better.losses}
        return codes, grid, group_of, notes

    def _neighbours(self, w: Tensor, grid: Grid) -> Tensor:
        width = w.shape[1] // grid.scales.shape[1]
        return torch.arange(w.shape[1], device=w.device) // width

    def _judge(self, name: str, moments: Moments, outcome: Outcome) -> None:
        s, float_weight, columns = self.settings, self._float(name), self.columns[name]
        quantized = linear(self.block, name).weight
        if s.dump_salient or s.salient_quota:
            error = quantized - float_weight * columns / self.rows[name]
            if s.dump_salient:
                self.notes[name]["salient"] = describe(error, moments.energy, self.heard[name])
            if s.salient_quota:
                outcome.salient[name] = residual_columns(error, moments.energy, s.salient_quota)
        result = quantized * self.rows[name] / columns  # in the channels of the source
        loss, nearest = relative_losses(float_weight, result, moments.gram, columns, self.rule)
        outcome.linears[name] = LinearReport(
            loss=loss, nearest_loss=nearest, notes=self.notes[name]
        )


def _store_plain(block: Block, packed: Collection[str]) -> dict[str, Tensor]:
    """All but the weights of `packed` linears, which take the values they are stored with."""
    plain = {}
    for name, parameter in block.named_parameters():
        if name.removesuffix(".weight") not in packed:
            plain[name] = parameter.detach().to(STORED)
            if not plain[name].isfinite().all():
                raise CheckpointError(f"{name} holds values beyond float16")
            parameter.copy_(plain[name])
    return plain
