"""Speech units to mel: conditional flow matching over a block-causal encoder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnispeech.models.flow_encoder import FlowEncoder, FlowEncoderConfig
from omnispeech.models.unet import UNet, UNetConfig

# Part of the published network, whatever rate the vocoder of the same directory speaks at.
FRAMES_PER_SECOND = Fraction(22050, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowConfig:
    input_size: int = 512
    output_size: int = 80  # mel bins
    spk_embed_dim: int = 192
    vocab_size: int = 16384
    input_frame_rate: float = 12.5  # units per second
    regulator_layers: int = 4
    regulator_groups: int = 1
    schedule: str = "cosine"
    guidance: float = 0.7
    encoder: FlowEncoderConfig = field(default_factory=FlowEncoderConfig)
    estimator: UNetConfig = field(default_factory=UNetConfig)


@dataclass(frozen=True, slots=True)
class Solver:
    """How the flow is integrated from noise to mel."""

    times: tuple[float, ...]  # rising from 0 to 1; one Euler step between neighbours
    guidance: float  # 0: the unconditional call is not made


def cosine_times(steps: int) -> Tensor:
    return 1 - torch.cos(linear_times(steps) * (0.5 * math.pi))


def linear_times(steps: int) -> Tensor:
    # In float32: the time encoding multiplies by a thousand, and so makes its rounding heard.
    return torch.linspace(0, 1, steps + 1, dtype=torch.float32, device="cpu")


SCHEDULES = {"cosine": cosine_times, "linear": linear_times}


class LengthRegulator(nn.Module):
    def __init__(self, channels: int, layers: int, groups: int) -> None:
        super().__init__()
        convolutions: list[nn.Module] = []
        for _ in range(layers):
            convolutions.append(nn.Conv1d(channels, channels, 3, padding=1))
            convolutions.append(nn.GroupNorm(groups, channels))
            convolutions.append(nn.Mish())
        self.model = nn.Sequential(*convolutions, nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """[B, n, M] -> [B, frames, M]"""
        x = x[:, unit_of_frame(x.shape[1], frames, x.device)]  # [B, T, M]
        return self.model(x.transpose(1, 2)).transpose(1, 2)


def unit_of_frame(units: int, frames: int, device: torch.device | None = None) -> Tensor:
    """[T]: which unit each frame shows.

    In float32 on purpose: exact arithmetic gives another unit for some frames (24 units: frames
    55 and 110), and through the norms over all frames that changes the whole mel.
    """
    scale = (torch.tensor(float(units)) / torch.tensor(float(frames))).item()
    at = torch.arange(frames, dtype=torch.float32, device=device) * scale
    return at.floor().long().clamp(max=units - 1)


class FlowMatching(nn.Module):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.estimator = UNet(config)

    def forward(self, noise: Tensor, conditions: Tensor, solver: Solver) -> Tensor:
        """noise [1, M, T], conditions [1, C, T] -> mel [1, M, T]"""
        x = noise
        if solver.guidance:
            # The guided and the free estimate are one batch; the free one knows no condition.
            conditions = torch.cat((conditions, torch.zeros_like(conditions)))
        tau = self.estimator.time_vectors(torch.tensor(solver.times[:-1], device=x.device))
        for k, (now, then) in enumerate(pairwise(solver.times)):
            rows = x.expand(conditions.shape[0], -1, -1)
            v = self.estimator(rows, conditions, tau[k : k + 1])
            if solver.guidance:
                v = (1 + solver.guidance) * v[:1] - solver.guidance * v[1:]
            x = x + (then - now) * v
        return x


class Flow(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        mels = config.output_size
        self.input_embedding = nn.Embedding(config.vocab_size, config.input_size)
        self.spk_embed_affine_layer = nn.Linear(config.spk_embed_dim, mels)
        self.encoder = FlowEncoder(config.encoder)
        self.encoder_proj = nn.Linear(config.encoder.output_size, mels)
        self.length_regulator = LengthRegulator(
            mels, config.regulator_layers, config.regulator_groups
        )
        self.decoder = FlowMatching(config.estimator)

    def frames(self, units: int) -> int:
        """How many mel frames so many units last."""
        return int(units * FRAMES_PER_SECOND / Fraction(str(self.config.input_frame_rate)))

    def solver(
        self, *, steps: int = 10, schedule: str | None = None, guidance: float | None = None
    ) -> Solver:
        """What is not given is as in the checkpoint."""
        times = SCHEDULES[schedule or self.config.schedule](steps)
        weight = self.config.guidance if guidance is None else guidance
        return Solver(tuple(times.tolist()), weight)

    def forward(
        self,
        units: Sequence[int],
        noise: Tensor,
        solver: Solver,
        prompt: Tensor | None = None,
        speaker: Tensor | None = None,
    ) -> Tensor:
        """noise [1, M, T], prompt [1, M, P], speaker [1, spk_embed_dim] -> mel [1, M, T - P]

        T is `frames(len(units))`. The prompt is mel that was made before from the first units.
        """
        frames = self.frames(len(units))
        assert noise.shape[2] == frames, (noise.shape, frames)
        known = noise.new_zeros(1, self.config.output_size, 0) if prompt is None else prompt
        mu = self.condition(units, frames).transpose(1, 2)  # [1, M, T]
        voice = self.voice(speaker)[:, :, None].expand(-1, -1, frames)  # [1, M, T]
        shown = F.pad(known, (0, frames - known.shape[2]))  # [1, M, T]
        mel = self.decoder(noise, torch.cat((mu, voice, shown), dim=1), solver)
        return mel[:, :, known.shape[2] :]

    def condition(self, units: Sequence[int], frames: int) -> Tensor:
        """-> [1, frames, M]"""
        ids = torch.tensor([units], device=self.input_embedding.weight.device).clamp(min=0)
        x = self.encoder_proj(self.encoder(self.input_embedding(ids)))  # [1, n, M]
        return self.length_regulator(x, frames)

    def voice(self, speaker: Tensor | None) -> Tensor:
        """[1, spk_embed_dim] -> [1, M]; no speaker is the one voice it was tuned on."""
        if speaker is None:
            speaker = self.spk_embed_affine_layer.weight.new_zeros(1, self.config.spk_embed_dim)
        return self.spk_embed_affine_layer(F.normalize(speaker, dim=1))
