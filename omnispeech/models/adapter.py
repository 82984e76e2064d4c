"""The adapter: encoder frames -> vectors as wide as the embeddings of the LLM."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from omnispeech.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    encoder_dim: int
    llm_dim: int
    inner_dim: int
    kernel_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.kernel_sizes or min(self.kernel_sizes) < 1:
            raise CheckpointError(
                f"conv_kernel_sizes={self.kernel_sizes}; allowed: one or more, each 1 or more"
            )


class Subsampler(nn.Module):
    """Convolutions of stride 2, each followed by a gate that halves the channels."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        kernels = config.kernel_sizes
        gated = [config.encoder_dim] * (len(kernels) - 1) + [config.llm_dim]
        self.conv_layers = nn.ModuleList(
            nn.Conv1d(config.encoder_dim, 2 * out, kernel, stride=2, padding=kernel // 2)
            for out, kernel in zip(gated, kernels, strict=True)
        )

    def forward(self, frames: Tensor) -> Tensor:
        """[B, T, encoder_dim] -> [B, T', llm_dim]; each convolution halves T"""
        x = frames.transpose(1, 2)  # [B, encoder_dim, T]
        for conv in self.conv_layers:
            x = F.glu(conv(x), dim=1)
        return x.transpose(1, 2)


class Adapter(nn.Module):
    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.subsampler = Subsampler(config)
        self.fc1 = nn.Linear(config.llm_dim, config.inner_dim, bias=False)
        self.fc2 = nn.Linear(config.inner_dim, config.llm_dim, bias=False)
        self.ln = nn.LayerNorm(config.llm_dim)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, T, encoder_dim] -> [B, T', llm_dim]; T' is at least output_length(T)"""
        x = self.subsampler(frames)
        return self.ln(x + self.fc2(F.gelu(self.fc1(x))))

    def output_length(self, frames: int) -> int:
        for _ in self.subsampler.conv_layers:
            frames = (frames - 1) // 2 + 1
        return frames
