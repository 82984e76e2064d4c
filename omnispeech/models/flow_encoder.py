"""The encoder of the flow: attention with relative positions that sees whole blocks of units."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "swish": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowEncoderConfig:
    input_size: int = 512
    output_size: int = 512
    attention_heads: int = 8
    linear_units: int = 2048
    num_blocks: int = 6  # layers
    block_size: int = 10  # units that see each other to the right as well
    activation: str = "swish"


class RelativePositions(nn.Module):
    """Sines and cosines of the distance from key to query."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [1, 2 T - 1, D], for the distances T - 1 down to 1 - T"""
        length, width = x.shape[1:]
        distance = torch.arange(length - 1, -length, -1.0, device=x.device)
        even = torch.arange(0, width, 2.0, device=x.device)
        angle = distance[:, None] * torch.exp(even * (-math.log(10000.0) / width))
        table = torch.stack((angle.sin(), angle.cos()), dim=-1)  # [2 T - 1, D / 2, 2]
        return table.flatten(1)[None].to(x.dtype)


class UnitEmbedding(nn.Module):
    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.out = nn.Sequential(
            nn.Linear(input_size, output_size), nn.LayerNorm(output_size, eps=1e-5)
        )
        self.pos_enc = RelativePositions()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, input_size] -> [B, T, D] and the positions [1, 2 T - 1, D]"""
        x = self.out(x)
        x = x * math.sqrt(x.shape[-1])
        return x, self.pos_enc(x)


class RelativeAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, width // heads))

    def forward(self, x: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """x [B, T, D], positions [1, 2 T - 1, D], visible [T, T] -> [B, T, D]"""
        q, k, v = (self._split(layer(x)) for layer in (self.linear_q, self.linear_k, self.linear_v))
        r = self._split(self.linear_pos(positions))  # [1, H, 2 T - 1, D / H]
        by_distance = (q + self.pos_bias_v[:, None]) @ r.transpose(2, 3)  # [B, H, T, 2 T - 1]
        bias = _by_key(by_distance) / math.sqrt(q.shape[-1])  # [B, H, T, T]
        bias = bias.masked_fill(~visible, -math.inf)
        y = F.scaled_dot_product_attention(q + self.pos_bias_u[:, None], k, v, attn_mask=bias)
        return self.linear_out(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, D / H]"""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


def _by_key(by_distance: Tensor) -> Tensor:
    """[B, H, T, 2 T - 1] over falling distance -> [B, H, T, T] over keys"""
    length = by_distance.shape[2]
    at = torch.arange(length, device=by_distance.device)
    column = length - 1 - at[:, None] + at[None, :]  # where the distance is query - key
    return by_distance.gather(3, column.expand(*by_distance.shape[:2], -1, -1))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.w_2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        return self.w_2(self.activation(self.w_1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config: FlowEncoderConfig) -> None:
        super().__init__()
        width = config.output_size
        self.self_attn = RelativeAttention(width, config.attention_heads)
        self.feed_forward = FeedForward(width, config.linear_units, config.activation)
        self.norm_ff = nn.LayerNorm(width, eps=1e-5)
        self.norm_mha = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        x = x + self.self_attn(self.norm_mha(x), positions, visible)
        return x + self.feed_forward(self.norm_ff(x))


class FlowEncoder(nn.Module):
    def __init__(self, config: FlowEncoderConfig) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.embed = UnitEmbedding(config.input_size, config.output_size)
        self.encoders = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_blocks))
        self.after_norm = nn.LayerNorm(config.output_size, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, input_size] -> [B, T, D]; a complete block does not depend on later ones."""
        visible = visible_keys(x.shape[1], self.block_size, x.device)
        x, positions = self.embed(x)
        for layer in self.encoders:
            x = layer(x, positions, visible)
        return self.after_norm(x)


def visible_keys(length: int, block_size: int, device: torch.device) -> Tensor:
    """[T, T]: a query sees everything to the left and the whole of its own block."""
    block = torch.arange(length, device=device) // block_size
    return block[None, :] <= block[:, None]
