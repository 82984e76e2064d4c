"""How far a quantized model is from the float model, on text that neither calibrated."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Kullback-Leibler divergence in nats per token, float model first."""

    kl: float  # mean
    kl_median: float
    kl_p99: float
    kl_p999: float
    top1: float  # share of tokens for which both would choose the same
    perplexity: float
    perplexity_change: float  # against the float model
    tokens: int


def divergence(exact: Tensor, other: Tensor, targets: Tensor, counted: Tensor) -> Divergence:
    """Logits [B, T, V] of both at the same inputs, next tokens [B, T], counted [B, T] bool."""
    exact, other = exact[counted].double(), other[counted].double()  # [tokens, V]
    p, q = F.log_softmax(exact, -1), F.log_softmax(other, -1)
    kl = (p.exp() * (p - q)).sum(-1)  # [tokens]
    before, after = (F.nll_loss(x, targets[counted]).exp().item() for x in (p, q))
    return Divergence(
        kl=kl.mean().item(),
        kl_median=kl.median().item(),
        kl_p99=kl.quantile(0.99).item(),
        kl_p999=kl.quantile(0.999).item(),
        top1=(exact.argmax(-1) == other.argmax(-1)).double().mean().item(),
        perplexity=after,
        perplexity_change=after - before,
        tokens=len(kl),
    )
