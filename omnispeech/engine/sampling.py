"""Choosing ids for several rows at once, each with its own settings and its own randomness."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from omnispeech.engine.events import TurnRequest

GREEDY_BELOW = 0.001  # the original's threshold for do_sample
NOT_FINITE = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampler:
    """Filters in the order temperature, top_k, top_p (spec: opens2s 12)."""

    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    random: Random = field(default_factory=Random)

    @property
    def greedy(self) -> bool:
        return self.temperature <= GREEDY_BELOW


def samplers(
    request: TurnRequest, seed: int, text_top_k: int, speech_top_k: int
) -> tuple[Sampler, Sampler]:
    """Text and speech draw from generators of their own: one running ahead changes nothing."""
    text = Sampler(
        temperature=request.temperature,
        top_k=text_top_k,
        top_p=request.top_p,
        random=Random(f"text {seed}"),
    )
    speech = Sampler(
        temperature=request.speech_temperature,
        top_k=speech_top_k,
        random=Random(f"speech {seed}"),
    )
    return text, speech


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """logits: [B, V], one sampler per row -> B indices; NOT_FINITE where a row holds NaN or inf.

    -inf marks what may not be chosen. One number is drawn from the row's own generator per
    sampled token, so a row draws the same whoever shares the call, on every device.
    """
    wide = logits.float()
    ids = wide.argmax(-1) if all(s.greedy for s in samplers) else _sample(wide, samplers)
    broken = ~torch.isfinite(wide.amax(-1))  # NaN is the largest to amax
    return torch.where(broken, NOT_FINITE, ids).tolist()


def _sample(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    vocabulary = logits.shape[-1]
    ranks = [1 if s.greedy else min(s.top_k or vocabulary, vocabulary) for s in samplers]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]  # [B, 1]

    scaled = logits / column([1.0 if s.greedy else s.temperature for s in samplers])
    values, ids = scaled.topk(max(ranks), dim=-1)  # [B, K] from the likeliest down
    rank = torch.arange(values.shape[-1], device=logits.device)
    values = values.masked_fill(rank >= column([float(r) for r in ranks]), -torch.inf)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # probability of everything likelier
    probabilities = probabilities.masked_fill(before >= column([s.top_p for s in samplers]), 0.0)
    total = probabilities.cumsum(-1)
    drawn = column([0.0 if s.greedy else s.random.random() for s in samplers])
    picked = torch.searchsorted(total, drawn * total[:, -1:], right=True)  # [B, 1]
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding must not pick beyond it
    return ids.gather(1, torch.minimum(picked, last.clamp(min=0)))[:, 0]
