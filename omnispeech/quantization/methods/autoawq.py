"""AutoAWQ's recipe to the letter, defects included (spec: quantization 2.1 to 2.5).

It is here to be measured against, and for those who need the file that AutoAWQ would write. In
float16 it follows AutoAWQ's own arithmetic; float32 is the same recipe without its rounding.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from omnispeech.errors import CheckpointError
from omnispeech.layers.kv_cache import KVCache
from omnispeech.layers.packing import QuantizedWeight
from omnispeech.models.qwen3 import Block
from omnispeech.quantization.method import LayerResult, LinearReport
from omnispeech.quantization.methods.branches import ATTENTION, BRANCHES, MLP, linear
from omnispeech.quantization.methods.grid import Rule
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.methods.statistics import Moments, check_weights, relative_losses
from omnispeech.quantization.stream import Batch, Stream

DTYPES = {"float16": torch.float16, "float32": torch.float32}
RATIOS = [i / 20 for i in range(20)]  # without 1.0, and with both scales on without the identity
SHRINKS = [1 - i / 20 for i in range(10)]
CLIP_TOKENS = 512
CLIP_ELEMENTS = 1 << 22  # of a product at a time
Run = Callable[[int], Tensor]  # output of a module for the inputs of one batch
UNCLIPPED = ("q_proj", "k_proj")  # their outputs meet in a product


@dataclass(frozen=True, slots=True)
class RangeRule:
    """The range of a group as it is, even without zero: a group of one sign is damaged."""

    group_size: int
    symmetric: bool

    def quantize(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., K] -> the rounded weight, scales [..., G] and zeros [..., G], in its dtype."""
        size = w.shape[-1] if self.group_size == -1 else self.group_size
        grouped = w.reshape(*w.shape[:-1], -1, size)
        if self.symmetric:
            scales = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 7
            rounded = (grouped / scales).round().clamp(-8, 7) * scales
            zeros = torch.full_like(scales, 8)
        else:
            high, low = grouped.amax(-1, keepdim=True), grouped.amin(-1, keepdim=True)
            scales = (high - low).clamp(min=1e-5) / 15
            zeros = (-(low / scales).round()).clamp(0, 15)
            codes = ((grouped / scales).round() + zeros).clamp(0, 15)
            rounded = (codes - zeros) * scales
        return rounded.reshape(w.shape), scales[..., 0], zeros[..., 0]

    def rounded(self, w: Tensor) -> Tensor:
        return self.quantize(w)[0]

    def pack(self, w: Tensor) -> QuantizedWeight:
        """The codes of the rounded weight are found by dividing it once more."""
        rounded, scales, zeros = self.quantize(w)
        grouped = rounded.view(*scales.shape, -1)
        codes = ((grouped + (zeros * scales)[..., None]) / scales[..., None]).round()
        return QuantizedWeight(
            codes=codes.clamp(0, 15).to(torch.uint8).view_as(w),
            zeros=zeros.to(torch.uint8),
            scales=scales.to(torch.float16),
            bits=4,
        )


class AutoAwq:
    """method rtn: its range rule alone, without scales and clipping."""

    def __init__(self, settings: MethodSettings) -> None:
        self.settings = settings
        self.dtype = DTYPES[settings.compatible_dtype]
        self.rule = RangeRule(settings.group_size, settings.symmetric)

    @torch.no_grad()
    def quantize(
        self, block: Block, floats: Stream, quantized: Stream, kept: Collection[str] = ()
    ) -> LayerResult:
        """Everything is judged on the states of the float model."""
        check_weights(block)
        block.to(self.dtype)
        work = LayerWork(block, [_cast(batch, self.dtype) for batch in floats.batches()], self.rule)
        if self.settings.method == "awq":
            work.scale(duo=self.settings.duo == "on")
        if self.settings.clips:
            work.clip(kept)
        rounded = [name for name in work.inputs if name not in kept]
        weights = {name: self.rule.pack(linear(block, name).weight) for name in rounded}
        block.float()
        for name, weight in weights.items():
            linear(block, name).weight.copy_(weight.dequantize())
        plain = {
            name: parameter.detach().half()
            for name, parameter in block.named_parameters()
            if name.removesuffix(".weight") not in weights
        }
        for name, stored in plain.items():
            block.get_parameter(name).copy_(stored)
        mended = Rule(4, self.settings.group_size, self.settings.symmetric)
        linears = {name: work.report(name, mended) for name in weights}
        return LayerResult(weights=weights, plain=plain, linears=linears)


def _cast(batch: Batch, dtype: torch.dtype) -> Batch:
    layers, tokens, heads, width = batch.cache.keys.shape
    cache = KVCache(layers, tokens, heads, width, dtype=dtype, device=batch.x.device)
    return replace(batch, x=batch.x.to(dtype), cache=cache)


class LayerWork:
    """One layer: the inputs of its linears, kept whole, and what became of its channels."""

    def __init__(self, block: Block, batches: Sequence[Batch], rule: RangeRule) -> None:
        self.block, self.batches, self.rule = block, batches, rule
        self.floats = {
            name: linear(block, name).weight.detach().clone()
            for branch in BRANCHES
            for name in branch.linears
        }
        self.inputs = self._listen()  # per linear and batch [T, K]
        one = torch.ones((), dtype=torch.float32, device=batches[0].x.device)
        self.columns = dict.fromkeys(self.floats, one)
        self.rows = dict.fromkeys(self.floats, one)
        self.ratios: dict[str, float] = {}

    def _listen(self) -> dict[str, list[Tensor]]:
        inputs: dict[str, list[Tensor]] = {name: [] for name in self.floats}

        def listen_to(name: str) -> torch.utils.hooks.RemovableHandle:
            def hear(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                inputs[name].append(args[0])

            return linear(self.block, name).register_forward_pre_hook(hear)

        handles = [listen_to(name) for name in inputs]
        for batch in self.batches:
            batch.run(self.block)
        for handle in handles:
            handle.remove()
        return inputs

    def scale(self, *, duo: bool) -> None:
        """All groups are searched with the weights of the source, then applied."""
        searched = [(names, self._search(names, run, duo)) for names, run in self._groups()]
        for names, scales in searched:
            self._apply(names, scales)

    def _groups(self) -> Iterator[tuple[tuple[str, ...], Run]]:
        """Linears that share their scales, and the output that judges them, per batch."""
        block, inputs = self.block, self.inputs
        normed, narrowed = inputs[ATTENTION.readers[0]], inputs[MLP.readers[0]]
        yield ATTENTION.readers, lambda i: self.batches[i].attend(block, normed[i])
        attention = block.self_attn
        if attention.v_proj.weight.shape == attention.o_proj.weight.shape:
            yield (ATTENTION.last,), lambda i: attention.o_proj(inputs[ATTENTION.last][i])
        yield MLP.readers, lambda i: block.mlp(narrowed[i])
        yield (MLP.last,), lambda i: block.mlp.down_proj(inputs[MLP.last][i])

    def _search(self, names: Sequence[str], run: Run, duo: bool) -> Tensor:
        """[K], the best scales of the grid."""
        mean, share = self._mean_input(names[0]), self._share(names)
        wanted = [_finite(run(i)) for i in range(len(self.batches))]
        best, best_loss = None, float("inf")
        for ratio in RATIOS:
            scales = _scales(mean, share if duo else None, ratio)
            self._try(names, scales)
            loss = self._loss(run, wanted)
            if loss < best_loss:
                best, best_loss = scales, loss
                self.ratios.update(dict.fromkeys(names, ratio))
        for name in names:
            linear(self.block, name).weight.copy_(self.floats[name])
        if best is None:
            raise CheckpointError(
                f"no channel scale of {names[0]} gives a finite loss in {self._dtype}; "
                "use the default recipe or compatible_dtype float32"
            )
        return best

    def _try(self, names: Sequence[str], scales: Tensor) -> None:
        for name in names:
            rounded = self.rule.rounded(self.floats[name] * scales)
            linear(self.block, name).weight.copy_(rounded / scales)

    def _loss(self, run: Run, wanted: Sequence[Tensor]) -> float:
        total, count = 0.0, 0
        for i, (batch, output) in enumerate(zip(self.batches, wanted, strict=True)):
            error = (output - _finite(run(i)))[batch.counted]
            total += float(error.float().square().sum())
            count += error.numel()
        return total / count

    def _mean_input(self, name: str) -> Tensor:
        """[K] mean |x|"""
        parts = [x[batch.counted].abs() for x, batch in self._heard(name)]
        total = sum((part.sum(0, dtype=torch.float32) for part in parts), torch.zeros(()))
        return (total / sum(len(part) for part in parts)).to(self._dtype)

    def _share(self, names: Sequence[str]) -> Tensor:
        """[K] mean over the rows of |w| over the largest of its group."""
        w = torch.cat([self.floats[name] for name in names])
        size = w.shape[1] if self.rule.group_size == -1 else self.rule.group_size
        grouped = w.view(-1, size).abs()
        return (grouped / (grouped.amax(1, keepdim=True) + 1e-6)).view(w.shape).mean(0)

    def _apply(self, names: Sequence[str], scales: Tensor) -> None:
        branch = next(b for b in BRANCHES if names[0] in b.linears)
        if names[0] == branch.last:
            before = linear(self.block, branch.before)
            before.weight.div_(scales[:, None])
            if before.bias is not None:
                before.bias.div_(scales)
            self.rows[branch.before] = scales.float()[:, None]
        else:
            branch.norm_of(self.block).weight.div_(scales)
        for name in names:
            linear(self.block, name).weight.mul_(scales)
            self.inputs[name] = [x / scales for x in self.inputs[name]]
            self.columns[name] = scales.float()

    def clip(self, kept: Collection[str]) -> None:
        for name in self.inputs:
            if not name.endswith(UNCLIPPED) and name not in kept:
                self._clip(name)

    def _clip(self, name: str) -> None:
        """Narrows each group to the symmetric range that disturbs its own part of the output least.

        The range of the quantizer is not symmetric; that is the recipe.
        """
        weight = linear(self.block, name).weight
        tokens = torch.cat([x[batch.counted] for x, batch in self._heard(name)])
        tokens = tokens[:: max(1, len(tokens) // CLIP_TOKENS)]
        size = weight.shape[1] if self.rule.group_size == -1 else self.rule.group_size
        heard = tokens.view(1, len(tokens), -1, size)  # [1, T, G, g]
        step = max(1, CLIP_ELEMENTS // tokens.numel())
        for rows in range(0, len(weight), step):
            part = weight[rows : rows + step]
            grouped = part.view(len(part), 1, -1, size)  # [N, 1, G, g]
            limit = self._limits(grouped, heard)
            part.copy_(grouped.clamp(-limit, limit).view_as(part))

    def _limits(self, w: Tensor, heard: Tensor) -> Tensor:
        """[N, 1, G, g] -> [N, 1, G, 1], the largest weight that is let through."""
        widest = w.abs().amax(-1, keepdim=True)
        output = (heard * w).sum(-1)  # [N, T, G]
        best, best_error = widest, torch.full_like(widest, torch.inf)
        rule = RangeRule(-1, self.rule.symmetric)
        for shrink in SHRINKS:
            limit = widest * shrink
            error = (heard * rule.rounded(w.clamp(-limit, limit))).sum(-1) - output
            error = error.pow(2).mean(1)[:, None, :, None]
            best = torch.where(error < best_error, limit, best)
            best_error = torch.minimum(error, best_error)
        return best

    def report(self, name: str, mended: Rule) -> LinearReport:
        """Call when the block holds the final weights. mended: what plain rounding means."""
        moments = Moments(self.floats[name].shape[1], self.floats[name].device)
        for x, batch in self._heard(name):
            moments.add(x[batch.counted].float())
        moments.finish(name)
        result = linear(self.block, name).weight * self.rows[name] / self.columns[name]
        columns = self.columns[name].expand(len(moments.magnitude))
        loss, nearest = relative_losses(
            self.floats[name].float(), result, moments.gram, columns, mended
        )
        scales = {"scales": "autoawq", "ratio": self.ratios[name]} if name in self.ratios else {}
        return LinearReport(loss=loss, nearest_loss=nearest, notes=scales)

    def _heard(self, name: str) -> Iterator[tuple[Tensor, Batch]]:
        return zip(self.inputs[name], self.batches, strict=True)

    @property
    def _dtype(self) -> torch.dtype:
        return self.floats[ATTENTION.last].dtype


def _scales(mean: Tensor, share: Tensor | None, ratio: float) -> Tensor:
    scales = mean.pow(ratio)
    if share is not None:
        scales = scales / (share.pow(1 - ratio) + 1e-4)
    scales = scales.clamp(min=1e-4)
    scales = scales / (scales.max() * scales.min()).sqrt()
    return torch.where(scales.isfinite(), scales, 1.0)


def _finite(output: Tensor) -> Tensor:
    """Overflow becomes the largest number there is."""
    limits = torch.finfo(output.dtype)
    return output.clamp(limits.min, limits.max)
