"""The server's networks over several rows of one length, with gradients.

Its language models run rows of any length over memory that is written in place; here every row is
padded at its end and has no memory. Its audio encoder takes whole segments; here the silence that
fills them may be left out. Tests hold both side by side.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from omnispeech.layers.rotary import rotate
from omnispeech.models.qwen3 import Attention, Block, CausalLM
from omnispeech.models.whisper import WhisperEncoder


def run(lm: CausalLM, x: Tensor) -> Tensor:
    """[B, T, D] -> [B, T, D] after the final norm"""
    decoder = lm.model
    rotary = decoder.config.rotary(torch.arange(x.shape[1], device=x.device))
    for block in decoder.layers:
        assert isinstance(block, Block)
        x = x + _attend(block.self_attn, block.input_layernorm(x), rotary)
        x = x + block.mlp(block.post_attention_layernorm(x))
    return decoder.norm(x)


def _attend(layer: Attention, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    split = (*x.shape[:2], -1, layer.head_dim)
    q = rotate(layer.q_norm(layer.q_proj(x).view(split)), *rotary)  # [B, T, H, head_dim]
    k = rotate(layer.k_norm(layer.k_proj(x).view(split)), *rotary)  # [B, T, G, head_dim]
    v = layer.v_proj(x).view(split)
    shared = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    )
    return layer.o_proj(y.transpose(1, 2).flatten(2))


def stacked(rows: list[Tensor]) -> Tensor:
    """[T, D] of any lengths -> [B, longest T, D]"""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def hear(encoder: WhisperEncoder, mel: Tensor) -> tuple[Tensor, Tensor]:
    """[B, M, T] -> [B, T / 2, D] before and [B, T / 4, D] after the pooling; T is a multiple of
    four, at most a segment."""
    x = F.gelu(encoder.conv1(mel))
    x = F.gelu(encoder.conv2(x)).transpose(1, 2)  # [B, T / 2, D]
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers:
        x = layer(x)
    return x, encoder.layer_norm(F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2))
