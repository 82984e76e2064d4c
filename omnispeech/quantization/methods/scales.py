"""Channel scales: the search on the Gram matrix, and folding them into the layer before.

Two scales are optimised together, the channel scale s[k] found here and the group scale of the grid
that W * s is rounded to; every candidate is judged with the grid that will be used in the end
(spec: quantization 2.3, 2.4, 3.2).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omnispeech.models.qwen3 import Block
from omnispeech.quantization.methods.branches import Branch, Trial, linear
from omnispeech.quantization.methods.grid import Grid, Rule, few_rows, joined
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.methods.statistics import Moments, output_energy

COARSE = 10  # steps from ratio 0 to 1
LIMIT = 1e4  # no channel is scaled further apart
ROWS = 1024  # of the linears together that candidates are told apart by; losses are sums over rows

Fit = Callable[[Tensor, Tensor], Grid]  # weights [N, K], Gram matrix of their inputs -> their grid


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    scales: Tensor  # [C]
    kind: str  # identity, activation or duo
    ratio: float
    loss: float = float("inf")  # on the Gram matrix, or of the true output once that is known

    def describe(self) -> dict[str, object]:
        return {"scales": self.kind, "ratio": round(self.ratio, 4)}


class Search:
    """Scales of the inputs of some linears that read the same thing."""

    def __init__(
        self, weights: Sequence[Tensor], moments: Moments, settings: MethodSettings, tie: Tensor
    ) -> None:
        """weights: [N, K] each; tie: [K] -> index of the scale that each column takes."""
        every = max(1, sum(map(len, weights)) // ROWS)
        self.rows = [w[::every] for w in weights]
        self.moments, self.tie = moments, tie
        self.rule = Rule(settings.bits, settings.group_size, settings.symmetric)
        self.final = final_fit(settings, self.rule)
        self.settings = settings
        self.magnitude = tied_mean(moments.magnitude, tie)  # [C]
        self.share = tied_mean(weight_share(weights, self.rule), tie)  # [C]

    def ranked(self) -> list[Choice]:
        """The identity and the candidates around the two best coarse ones, best first."""
        one = Choice(torch.ones_like(self.magnitude), "identity", 0.0)
        coarse = self._judged(self._coarse(), self._widest)
        best = coarse[:2]
        fine = self._judged([one, *best, *self._fine(best)], self.final)
        return fine

    def best(self) -> Choice:
        return self.ranked()[0]

    def best_of_true(self, trial: Trial, names: Sequence[str]) -> Choice:
        """The three finalists (the identity is one) by the true output of the branch."""
        ranked = self.ranked()
        finalists = [c for c in ranked if c.kind != "identity"][:2]
        finalists.insert(0, next(c for c in ranked if c.kind == "identity"))
        judged = [replace(c, loss=trial.loss_with(names, self._rounding(c))) for c in finalists]
        return min(judged, key=lambda c: c.loss)

    def _coarse(self) -> Iterable[Choice]:
        kinds = {"on": ("duo",), "off": ("activation",), "both": ("activation", "duo")}
        for kind in kinds[self.settings.duo]:
            for i in range(COARSE + 1):
                if i or kind == "duo":
                    yield self._choice(kind, i / COARSE)

    def _fine(self, best: Sequence[Choice]) -> Iterable[Choice]:
        """A density of m holds every point of the densities that divide it."""
        seen: set[tuple[str, float]] = set()
        for choice in best:
            for j in range(1, self.settings.search_step + 1):
                for sign in (-1, 1):
                    ratio = round(
                        choice.ratio + sign * j / (2 * COARSE * self.settings.search_step), 9
                    )
                    if 0 < ratio < 1 and (choice.kind, ratio) not in seen:
                        seen.add((choice.kind, ratio))
                        yield self._choice(choice.kind, ratio)

    def _choice(self, kind: str, ratio: float) -> Choice:
        """Channels that are never active keep the scale 1."""
        live = self.magnitude > 0
        scales = self.magnitude.pow(ratio)
        if kind == "duo":
            scales = scales / (self.share.pow(1 - ratio) + 1e-4)
        scales = scales.clamp_min(1e-8)
        known = scales[live] if live.any() else scales.new_ones(1)
        scales = (scales / (known.max() * known.min()).sqrt()).clamp(1 / LIMIT, LIMIT)
        return Choice(torch.where(live, scales, 1.0), kind, ratio)

    def _judged(self, choices: Iterable[Choice], fit: Fit) -> list[Choice]:
        """Sorted by loss; the first of equals stays first."""
        judged = [replace(c, loss=self._loss(c.scales[self.tie], fit)) for c in choices]
        return sorted(judged, key=lambda c: c.loss)

    def _loss(self, scales: Tensor, fit: Fit) -> float:
        """tr(dW gram dW^T), summed over the linears."""
        gram = self._fitted(scales)
        total = torch.zeros((), device=scales.device)
        for w in self.rows:
            for rows in few_rows(w):
                scaled = rows * scales
                error = fit(scaled, gram).nearest(scaled).sub_(scaled).div_(scales)
                total += output_energy(error, self.moments.gram).sum()
        return float(total)

    def _rounding(self, choice: Choice) -> Callable[[Tensor], Tensor]:
        """Weights [N, K] -> the same, rounded while they are scaled."""
        scales = choice.scales[self.tie]
        gram = self._fitted(scales)

        def rounded(w: Tensor) -> Tensor:
            scaled = w * scales
            return self.final(scaled, gram).nearest(scaled).div_(scales)

        return rounded

    def _fitted(self, scales: Tensor) -> Tensor:
        """What ranges are narrowed by: the Gram matrix of inputs that are divided by scales [K]."""
        if not self.settings.clips:
            return self.moments.gram
        return (self.moments.gram / scales).div_(scales[:, None])

    def _widest(self, w: Tensor, gram: Tensor) -> Grid:
        return self.rule.widest(w)


def final_fit(settings: MethodSettings, rule: Rule) -> Fit:
    """The range quantizer that the stored weights are made with."""

    def narrowed(w: Tensor, gram: Tensor) -> Grid:
        blocks = rule.blocks(gram)
        return joined([better(rows, blocks, gram) for rows in few_rows(w)])

    def better(w: Tensor, blocks: Tensor, gram: Tensor) -> Grid:
        # groups are narrowed one by one; together they must still be better, row by row
        heard, widest = rule.heard(w, blocks), rule.widest(w)
        errors = [output_energy(grid.nearest(w).sub_(w), gram) for grid in (heard, widest)]
        return heard.where(errors[0] < errors[1], widest)

    return narrowed if settings.clips else lambda w, gram: rule.widest(w)


def weight_share(weights: Sequence[Tensor], rule: Rule) -> Tensor:
    """[K] mean over all rows of |w| over the largest of its group."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for w in weights:
        for rows in few_rows(w):
            size = rule.grouped(rows).abs()
            total += (size / (size.amax(-1, keepdim=True) + 1e-6)).view_as(rows).sum(0)
    return total / sum(len(w) for w in weights)


def tied_mean(values: Tensor, tie: Tensor) -> Tensor:
    """[K] -> [C], the mean over the columns that share a scale."""
    total = values.new_zeros(int(tie.max()) + 1).index_add_(0, tie, values)
    return total / tie.bincount(minlength=len(total))


def fold_into_norm(block: Block, branch: Branch, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Divides the norm by scales [K] and multiplies its readers by them.

    The norm is rounded to the dtype it is stored in, and the scales that result from that are
    returned: the float function of the layer stays the same.
    """
    norm = branch.norm_of(block).weight
    stored = (norm / scales).to(dtype).float()
    usable = stored.isfinite() & (stored != 0)
    stored = torch.where(usable, stored, norm.to(dtype).float())
    exact = torch.where(stored != 0, norm / stored, 1.0)
    norm.copy_(stored)
    for name in branch.readers:
        linear(block, name).weight.mul_(exact)
    return exact


def fold_into_rows(
    block: Block, branch: Branch, scales: Tensor, tie: Tensor, dtype: torch.dtype
) -> None:
    """Divides the rows of the linear before by scales [C], multiplies the columns of the last.

    tie: [K] -> C; a bias is rounded to the dtype it is stored in.
    """
    before = linear(block, branch.before)
    before.weight.div_(scales[:, None])
    if before.bias is not None:
        before.bias.copy_((before.bias / scales).to(dtype))
    linear(block, branch.last).weight.mul_(scales[tie])
