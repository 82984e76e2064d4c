"""Outlier channels put into a model without changing what it computes: M2 of the quality tests.

What a norm, the values or the up projection give is multiplied per channel, and the columns that
read it are divided by the same. Outliers then lie where large models have them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.byte_lm import ByteLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Outliers:
    sigma: float  # of the logarithm of every channel's factor
    times: float  # on top of it, for a few
    share: float = 0.012  # of the channels
    seed: int = 0


MODERATE = Outliers(sigma=0.6, times=12.0)
STRONG = Outliers(sigma=0.8, times=40.0)

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


def inject(model: ByteLM, outliers: Outliers) -> ByteLM:
    weights = {name: weight.clone() for name, weight in model.weights.items()}
    generator = torch.Generator().manual_seed(outliers.seed)
    shared = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer in range(model.config.num_hidden_layers):
        for source, readers in READERS.items():
            weight = weights[f"model.layers.{layer}.{source}.weight"]
            c = factors(len(weight), outliers, generator)
            weight *= c.view(-1, *[1] * (weight.dim() - 1))
            if source == "self_attn.v_proj":  # several heads of queries read one head of values
                heads = c.view(-1, model.config.head_dim)
                c = heads.repeat_interleave(shared, 0).flatten()
            for reader in readers:
                weights[f"model.layers.{layer}.{reader}.weight"] /= c
    return ByteLM(model.raw, weights)


def factors(channels: int, outliers: Outliers, generator: torch.Generator) -> Tensor:
    """[channels], all positive."""
    c = torch.exp(outliers.sigma * torch.randn(channels, generator=generator))
    few = max(1, round(outliers.share * channels))
    c[torch.randperm(channels, generator=generator)[:few]] *= outliers.times
    return c
