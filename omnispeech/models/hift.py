"""The vocoder: a harmonic source, shaped by convolutions in the spectrum, and an inverse STFT."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class HiFTConfig:
    in_channels: int = 80  # mel bins
    base_channels: int = 512
    nb_harmonics: int = 8  # beside the fundamental
    sampling_rate: int = 22050
    nsf_alpha: float = 0.1
    nsf_sigma: float = 0.003
    nsf_voiced_threshold: float = 10.0
    upsample_rates: tuple[int, ...] = (8, 8)
    upsample_kernel_sizes: tuple[int, ...] = (16, 16)
    n_fft: int = 16
    hop_len: int = 4
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    source_resblock_kernel_sizes: tuple[int, ...] = (7, 11)
    source_resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 2
    lrelu_slope: float = 0.1
    audio_limit: float = 0.99
    f0_channels: int = 512

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return math.prod(self.upsample_rates) * self.hop_len

    @property
    def f0_reach(self) -> int:
        """A pitch depends on so many mel frames on either side."""
        return F0_LAYERS

    @property
    def filter_reach(self) -> int:
        """A sample depends on mel and source no further away than so many frames."""
        last = self.hop // self.hop_len  # steps per frame behind the last stage
        reach = 3 / last + 2 * self.n_fft / self.hop  # conv_post and both transforms
        reaches = []
        for i in reversed(range(len(self.upsample_rates))):
            rate = math.prod(self.upsample_rates[: i + 1])
            blocks = zip(self.resblock_kernel_sizes, self.resblock_dilation_sizes, strict=True)
            reach += max(_block_reach(kernel, dilations) for kernel, dilations in blocks) / rate
            source = _block_reach(
                self.source_resblock_kernel_sizes[i], self.source_resblock_dilation_sizes[i]
            )
            reaches.append(reach + (source + 1) / rate)  # of the source that joins here
            reach += self.upsample_kernel_sizes[i] / 2 / rate
        return math.ceil(max(*reaches, reach + 3))  # conv_pre


F0_LAYERS = 5


def _block_reach(kernel: int, dilations: tuple[int, ...]) -> int:
    return sum((kernel // 2) * (dilation + 1) for dilation in dilations)


class F0Predictor(nn.Module):
    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(F0_LAYERS):
            layers += [nn.Conv1d(channels if i else in_channels, channels, 3, padding=1), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 1)

    def forward(self, mel: Tensor) -> Tensor:
        """[B, M, T] -> Hz [B, T]"""
        # The phase adds up every rounding of the pitch, and TF32 rounds far too coarsely.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = self.condnet(mel).transpose(1, 2)  # [B, T, C]
        return self.classifier(x).squeeze(2).abs()


class Sines(nn.Module):
    """The fundamental and its harmonics where there is voice, and noise everywhere."""

    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, f0: Tensor, phases: Tensor, noise: Tensor, start: Tensor | None = None
    ) -> Tensor:
        """f0 [B, N], phases [B, H], noise [B, H, N], start [B] -> [B, H, N]

        `start` is how many cycles the fundamental has made before, in float64. Without it they
        are counted from zero in float32 for each harmonic, as the original does.
        """
        config = self.config
        harmonic = torch.arange(1, config.nb_harmonics + 2, device=f0.device)[:, None]  # [H, 1]
        if start is None:
            cycles = (f0[:, None] * harmonic / config.sampling_rate).cumsum(2) % 1  # [B, H, N]
        else:
            fundamental = start[:, None] + (f0.double() / config.sampling_rate).cumsum(1)
            cycles = (fundamental[:, None] * harmonic % 1).to(f0.dtype)
        sines = config.nsf_alpha * torch.sin(2 * math.pi * cycles + phases[:, :, None])
        voiced = (f0 > config.nsf_voiced_threshold)[:, None]  # [B, 1, N]
        loudness = torch.where(voiced, config.nsf_sigma, config.nsf_alpha / 3)
        return sines * voiced + loudness * noise


class Source(nn.Module):
    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        self.config = config
        self.l_sin_gen = Sines(config)
        self.l_linear = nn.Linear(config.nb_harmonics + 1, 1)

    def forward(
        self, f0: Tensor, phases: Tensor, noise: Tensor, start: Tensor | None = None
    ) -> Tensor:
        """f0 [B, T], phases [B, H], noise [B, H, T hop], start [B] -> [B, 1, T hop]"""
        f0 = f0.repeat_interleave(self.config.hop, dim=1)  # [B, N]
        sines = self.l_sin_gen(f0, phases, noise, start)  # [B, H, N]
        return torch.tanh(self.l_linear(sines.transpose(1, 2))).transpose(1, 2)

    def cycles_after(self, f0: Tensor, start: Tensor) -> Tensor:
        """f0 [B, T], start [B] -> [B]: cycles of the fundamental after these frames, modulo 1"""
        return (start + f0.double().sum(1) * self.config.hop / self.config.sampling_rate) % 1


class Snake(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T]"""
        alpha = self.alpha[:, None]
        return x + torch.sin(alpha * x).square() / (alpha + 1e-9)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()

        def convolution(dilation: int) -> nn.Module:
            padding = (kernel - 1) * dilation // 2
            return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=padding)

        self.convs1 = nn.ModuleList(convolution(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(convolution(1) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T]"""
        layers = (self.activations1, self.convs1, self.activations2, self.convs2)
        for snake1, conv1, snake2, conv2 in zip(*layers, strict=True):
            x = x + conv2(snake2(conv1(snake1(x))))
        return x


class HiFT(nn.Module):
    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        self.config = config
        stages = len(config.upsample_rates)
        widths = [config.base_channels // 2**i for i in range(stages + 1)]
        bins = config.n_fft + 2  # real parts, then imaginary parts
        self.m_source = Source(config)
        self.f0_predictor = F0Predictor(config.in_channels, config.f0_channels)
        self.conv_pre = nn.Conv1d(config.in_channels, widths[0], 7, padding=3)
        self.ups = nn.ModuleList(_rise(config, i, widths) for i in range(stages))
        self.source_downs = nn.ModuleList(_fall(config, i, bins, widths) for i in range(stages))
        self.source_resblocks = nn.ModuleList(
            ResidualBlock(
                width,
                config.source_resblock_kernel_sizes[i],
                config.source_resblock_dilation_sizes[i],
            )
            for i, width in enumerate(widths[1:])
        )
        kernels = config.resblock_kernel_sizes
        self.resblocks = nn.ModuleList(
            ResidualBlock(width, kernel, dilations)
            for width in widths[1:]
            for kernel, dilations in zip(kernels, config.resblock_dilation_sizes, strict=True)
        )
        self.conv_post = nn.Conv1d(widths[-1], bins, 7, padding=3)

    def forward(self, mel: Tensor, source: Tensor) -> Tensor:
        """mel [B, M, T], source [B, 1, T hop] -> samples [B, T hop]"""
        spectrum = self.source_spectrum(source)  # [B, bins, T hop / hop_len + 1]
        per_stage = len(self.config.resblock_kernel_sizes)
        last = len(self.ups) - 1
        x = self.conv_pre(mel)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, self.config.lrelu_slope))  # [B, C / 2, T rate]
            if i == last:
                x = F.pad(x, (1, 0), mode="reflect")  # one step more, as the spectrum has
            x = x + self.source_resblocks[i](self.source_downs[i](spectrum))
            blocks = self.resblocks[i * per_stage : (i + 1) * per_stage]
            x = torch.stack([block(x) for block in blocks]).mean(0)
        x = self.conv_post(F.leaky_relu(x, 0.01))  # [B, bins, T hop / hop_len + 1]
        return self.samples(x).clamp(-self.config.audio_limit, self.config.audio_limit)

    def source_spectrum(self, source: Tensor) -> Tensor:
        """[B, 1, N] -> [B, n_fft + 2, N / hop_len + 1]"""
        n_fft, hop = self.config.n_fft, self.config.hop_len
        window = torch.hann_window(n_fft, dtype=source.dtype, device=source.device)
        spectrum = torch.stft(source[:, 0], n_fft, hop, window=window, return_complex=True)
        return torch.cat((spectrum.real, spectrum.imag), dim=1)

    def samples(self, x: Tensor) -> Tensor:
        """[B, n_fft + 2, T] -> [B, (T - 1) hop_len]"""
        n_fft, hop = self.config.n_fft, self.config.hop_len
        level, angle = x.chunk(2, dim=1)
        angle = angle.sin()  # the network was trained with the sine itself as the angle
        spectrum = torch.polar(level.exp().clamp(max=100.0), angle)
        window = torch.hann_window(n_fft, dtype=x.dtype, device=x.device)
        return torch.istft(spectrum, n_fft, hop, window=window)


def _rise(config: HiFTConfig, stage: int, widths: list[int]) -> nn.Module:
    rate, kernel = config.upsample_rates[stage], config.upsample_kernel_sizes[stage]
    return nn.ConvTranspose1d(
        widths[stage], widths[stage + 1], kernel, stride=rate, padding=(kernel - rate) // 2
    )


def _fall(config: HiFTConfig, stage: int, bins: int, widths: list[int]) -> nn.Module:
    """Brings the spectrum of the source down to the rate of the stage."""
    rate = math.prod(config.upsample_rates[stage + 1 :])
    if rate == 1:
        return nn.Conv1d(bins, widths[stage + 1], 1)
    return nn.Conv1d(bins, widths[stage + 1], 2 * rate, stride=rate, padding=rate // 2)
