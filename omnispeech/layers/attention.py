"""Causal attention of several conversations in one call, each over its own past."""

import torch
import torch.nn.functional as F
from torch import Tensor

from omnispeech.layers.kv_cache import KVCache, Layout, Span


def attend(queries: Tensor, cache: KVCache, layer: int, layout: Layout) -> Tensor:
    """queries: [T, H, D], keys of the call already in the cache -> [T, H, D]"""
    parts = [_attend_row(queries[span.tokens], cache, layer, span) for span in layout.spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_row(queries: Tensor, cache: KVCache, layer: int, span: Span) -> Tensor:
    keys = cache.keys[layer, span.keys]  # [L, G, D]
    values = cache.values[layer, span.keys]
    if span.mask is not None:
        # no memory-saving kernel takes a mask and fewer key heads than query heads
        shared = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
    out = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],  # [1, H, T, D]
        keys.transpose(0, 1)[None],  # [1, G, L, D]
        values.transpose(0, 1)[None],
        attn_mask=span.mask,
        is_causal=span.mask is None and len(queries) > 1,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return out[0].transpose(0, 1)  # [T, H, D]
