"""The estimator of the flow: a 1-D U-Net with transformer blocks, not causal."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GELU_FORMS = {"gelu": "none", "gelu-approximate": "tanh"}


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig:
    in_channels: int = 320
    out_channels: int = 80
    channels: tuple[int, ...] = (256, 256)  # of each stage on the way down
    attention_head_dim: int = 64
    n_blocks: int = 4  # transformer blocks after each ResNet block
    num_mid_blocks: int = 12
    num_heads: int = 8
    act_fn: str = "gelu"


class TimeEncoding(nn.Module):
    """Sines and cosines of the position on the way from noise to mel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, times: Tensor) -> Tensor:
        """[B] -> [B, D]"""
        half = self.width // 2
        index = torch.arange(half, device=times.device)
        rate = torch.exp(index * (-math.log(10000.0) / (half - 1)))
        angle = 1000 * times[:, None] * rate
        return torch.cat((angle.sin(), angle.cos()), dim=1)


class TimeMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, hidden]"""
        return self.linear_2(F.silu(self.linear_1(x)))


class Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            (nn.Conv1d(in_channels, out_channels, 3, padding=1), nn.GroupNorm(8, out_channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, T] -> [B, out_channels, T]"""
        conv, norm = self.block
        return F.mish(norm(conv(x)))


class ResNetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, time_width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_width, out_channels))
        self.block1 = Block(in_channels, out_channels)
        self.block2 = Block(out_channels, out_channels)
        self.res_conv = nn.Conv1d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        """x [B, in_channels, T], tau [1, D] -> [B, out_channels, T]"""
        h = self.block1(x) + self.mlp(tau)[:, :, None]
        return self.block2(h) + self.res_conv(x)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_k = nn.Linear(width, heads * head_width, bias=False)
        self.to_v = nn.Linear(width, heads * head_width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        q, k, v = (
            layer(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # [B, H, T, head width]
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


class GELU(nn.Module):
    def __init__(self, width: int, hidden: int, form: str) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, hidden]"""
        return F.gelu(self.proj(x), approximate=self.form)


class FeedForward(nn.Module):
    def __init__(self, width: int, act_fn: str) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GELU(width, 4 * width, GELU_FORMS[act_fn]), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn1 = Attention(width, config.num_heads, config.attention_head_dim)
        self.norm3 = nn.LayerNorm(width, eps=1e-5)
        self.ff = FeedForward(width, config.act_fn)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]"""
        x = x + self.attn1(self.norm1(x))
        return x + self.ff(self.norm3(x))


class HalveTime(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, ceil(T / 2)]"""
        return self.conv(x)


class DoubleTime(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, 2 T]"""
        return self.conv(x)


class UNet(nn.Module):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        widths = config.channels
        tau_width = 4 * widths[0]
        self.time_embeddings = TimeEncoding(config.in_channels)
        self.time_mlp = TimeMLP(config.in_channels, tau_width)

        def stage(in_channels: int, out_channels: int, *resize: nn.Module) -> nn.ModuleList:
            blocks = (TransformerBlock(out_channels, config) for _ in range(config.n_blocks))
            resnet = ResNetBlock(in_channels, out_channels, tau_width)
            return nn.ModuleList((resnet, nn.ModuleList(blocks), *resize))

        last = len(widths) - 1
        inputs = (config.in_channels, *widths)
        self.down_blocks = nn.ModuleList(
            stage(inputs[i], width, HalveTime(width) if i < last else _same_time(width))
            for i, width in enumerate(widths)
        )
        self.mid_blocks = nn.ModuleList(
            stage(widths[-1], widths[-1]) for _ in range(config.num_mid_blocks)
        )
        rising = (*reversed(widths), widths[0])
        self.up_blocks = nn.ModuleList(
            stage(2 * rising[i], width, DoubleTime(width) if i < last else _same_time(width))
            for i, width in enumerate(rising[1:])
        )
        self.final_block = Block(widths[0], widths[0])
        self.final_proj = nn.Conv1d(widths[0], config.out_channels, 1)

    def time_vectors(self, times: Tensor) -> Tensor:
        """[S] -> [S, D]; they depend on nothing else, so a whole schedule is made at once."""
        return self.time_mlp(self.time_embeddings(times))

    def forward(self, x: Tensor, conditions: Tensor, tau: Tensor) -> Tensor:
        """x [B, M, T], conditions [B, in_channels - M, T], tau [1, D] -> [B, M, T]"""
        x = torch.cat((x, conditions), dim=1)
        skips: list[Tensor] = []
        for stage in self.down_blocks:
            resnet, blocks, resize = stage.children()
            x = _stage(resnet, blocks, x, tau)
            skips.append(x)
            x = resize(x)
        for stage in self.mid_blocks:
            resnet, blocks = stage.children()
            x = _stage(resnet, blocks, x, tau)
        for stage in self.up_blocks:
            resnet, blocks, resize = stage.children()
            skip = skips.pop()
            x = torch.cat((x[:, :, : skip.shape[2]], skip), dim=1)  # [B, 2 C, T]
            x = resize(_stage(resnet, blocks, x, tau))
        return self.final_proj(self.final_block(x))


def _stage(resnet: nn.Module, blocks: nn.Module, x: Tensor, tau: Tensor) -> Tensor:
    """[B, in_channels, T] -> [B, C, T]"""
    x = resnet(x, tau).transpose(1, 2)  # [B, T, C]
    for block in blocks.children():
        x = block(x)
    return x.transpose(1, 2)


def _same_time(channels: int) -> nn.Module:
    return nn.Conv1d(channels, channels, 3, padding=1)
