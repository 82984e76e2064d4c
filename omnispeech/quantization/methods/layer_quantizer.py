"""The methods: channel scales, rounding and a look back, for one decoder layer at a time."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnispeech.errors import CheckpointError
from omnispeech.layers.packing import QuantizedWeight
from omnispeech.models.qwen3 import Block
from omnispeech.quantization.memory import return_memory
from omnispeech.quantization.method import LayerResult, LinearReport, Method
from omnispeech.quantization.methods.autoawq import AutoAwq
from omnispeech.quantization.methods.branches import BRANCHES, Branch, Trial, linear
from omnispeech.quantization.methods.gptq import (
    Factor,
    compensate,
    compensate_in_turn,
    factorize,
    groups_in_order,
)
from omnispeech.quantization.methods.grid import Grid, Rule, few_rows
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
    losses_of_rows,
    observe,
)
from omnispeech.quantization.stored import install
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
        outcomes = []
        for branch in BRANCHES:
            outcomes.append(_BranchWork(self.settings, block, branch, quantized, kept).outcome())
            return_memory()
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
        self.trial = Trial(block, branch, stream, TRIAL_TOKENS)
        self.floats = self.trial.floats
        self.moments: dict[str, Moments] = {}
        self._listen()

    def outcome(self) -> Outcome:
        if not (names := (*self.readers, *self.last)):
            return Outcome()
        plain = self.trial.loss_with(names, lambda w: self.rule.widest(w).nearest(w))
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
        # the last linear makes good what the readers lost, too
        again = plan.compensated and self.readers and self.last
        if again:
            del self.moments[b.last]
        self._round(self.readers, plan, outcome)
        del self.moments[b.readers[0]]
        if again:
            self.moments |= observe(self.block, b, self.stream, [b.last])
        self._round(self.last, plan, outcome)
        return outcome

    def _listen(self) -> None:
        b = self.branch
        self.moments.clear()  # before others are made
        self.moments |= observe(self.block, b, self.stream, [b.readers[0], b.last])
        heard = {name: m.magnitude.clone() for name, m in self.moments.items()}
        self.heard = {name: heard.get(name, heard[b.readers[0]]) for name in b.linears}
        weights = {name: linear(self.block, name).weight for name in b.linears}
        self.columns = {n: torch.ones_like(w[0]) for n, w in weights.items()}  # multiplied by
        self.rows = {n: torch.ones_like(w[:, :1]) for n, w in weights.items()}  # divided by

    def _start_again(self) -> None:
        self.floats.restore()
        self._listen()

    def _scale_readers(self) -> None:
        names = self.branch.readers
        moments = self.moments[names[0]]
        tie = torch.arange(len(moments.magnitude), device=moments.magnitude.device)
        weights = [linear(self.block, n).weight for n in names]
        search = Search(weights, moments, self.settings, tie)
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
        choice = Search([linear(self.block, b.last).weight], moments, self.settings, tie).best()
        fold_into_rows(self.block, b, choice.scales, tie, STORED)
        moments.divide(choice.scales[tie])
        self.columns[b.last] = choice.scales[tie]
        self.rows[b.before] = choice.scales[:, None]
        self.notes[b.last] |= choice.describe()

    def _round(self, names: Sequence[str], plan: _Plan, outcome: Outcome) -> None:
        """Linears that read the same thing share what is made of its moments."""
        if not names:
            return
        moments = self.moments[names[0]]
        factor = self._factor(names, moments, plan)
        rounded = {
            name: self._codes(linear(self.block, name).weight, moments, plan, factor)
            for name in names
        }
        del factor  # as large as the Gram matrix
        for name, (codes, grid, group_of) in rounded.items():
            if self.settings.passes > 1 and not plan.plain:
                codes, grid = self._refined(name, moments, codes, grid, group_of)
            outcome.weights[name] = grid.weight(codes, group_of)
            install(self.block, {name: outcome.weights[name]}, {})
            self._judge(name, moments, outcome)

    def _factor(self, names: Sequence[str], moments: Moments, plan: _Plan) -> Factor | None:
        if not plan.compensated:
            return None
        s = self.settings
        factor = factorize(moments.gram, by_activation=s.act_order, damping=s.damping)
        for name in names:
            self.notes[name] |= (
                {"damping": factor.damping}
                if factor is not None
                else {"rounding": "nearest: no damping made the Gram matrix definite"}
            )
        return factor

    def _codes(
        self, w: Tensor, moments: Moments, plan: _Plan, factor: Factor | None
    ) -> tuple[Tensor, Grid, Tensor | None]:
        """Codes [N, K], their grid, the group of each column if not neighbours."""
        if factor is not None and not self.settings.fixed_groups:
            codes, grid = compensate_in_turn(w, factor, self.rule)
            return codes, grid, groups_in_order(factor.order, w.shape[1] // grid.scales.shape[1])
        narrowed = final_fit(self.settings, self.rule)
        fit = self.rule.widest(w) if plan.plain else narrowed(w, moments.gram)
        return (fit.codes(w) if factor is None else compensate(w, factor, fit)), fit, None

    def _refined(
        self, name: str, moments: Moments, codes: Tensor, grid: Grid, group_of: Tensor | None
    ) -> tuple[Tensor, Grid]:
        w = linear(self.block, name).weight
        known = group_of if group_of is not None else self._neighbours(w, grid)
        better = refine(
            w,
            moments.gram,
            codes,
            grid,
            group_of=known.long(),
            passes=self.settings.passes - 1,
        )
        self.notes[name] |= {"passes": len(better.losses), "losses": better.losses}
        return better.codes, better.grid

    def _neighbours(self, w: Tensor, grid: Grid) -> Tensor:
        width = w.shape[1] // grid.scales.shape[1]
        return torch.arange(w.shape[1], device=w.device) // width

    def _judge(self, name: str, moments: Moments, outcome: Outcome) -> None:
        s, columns = self.settings, self.columns[name]
        error = self.floats.weight(name).mul_(columns).div_(self.rows[name])
        error.neg_().add_(linear(self.block, name).weight)
        self.notes[name]["salient"] = describe(error, moments.energy, self.heard[name])
        if s.salient_quota:
            outcome.salient[name] = residual_columns(error, moments.energy, s.salient_quota)
        del error
        loss, nearest = losses_of_rows(self._pairs(name), moments.gram, columns, self.rule)
        outcome.linears[name] = LinearReport(
            loss=loss, nearest_loss=nearest, notes=self.notes[name]
        )

    def _pairs(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows [N, K] at a time: float weights and their result, in channels of the source."""
        start = 0
        for quantized in few_rows(linear(self.block, name).weight):
            rows = slice(start, start + len(quantized))
            result = (quantized * self.rows[name][rows]).div_(self.columns[name])
            yield self.floats.weight(name, rows), result
            start = rows.stop


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
