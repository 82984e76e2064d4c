"""Samples -> the mel that flow and vocoder of this model speak of.

Only the vocoder ever reads it, so it is normalised: mean 0 and deviation 1 over the answers.
"""

from functools import lru_cache

import torch
from torch import Tensor

from omnispeech.audio.features import MelConfig, mel_filters

HOP = 256  # of the published decoder
WINDOW = 1024
BINS = 80
QUIETEST = 2e-4  # what lies below is silence
MEAN, DEVIATION = -5.3, 2.3  # of the logarithms, over all answers


@lru_cache(maxsize=4)
def filters(rate_hz: int, window: int) -> Tensor:
    """[M, window / 2 + 1] up to 8 kHz"""
    config = MelConfig(feature_size=BINS, sampling_rate=rate_hz, n_fft=window, hop_length=HOP)
    return mel_filters(config)


def log_mel(samples: Tensor, rate_hz: int, *, hop: int = HOP) -> Tensor:
    """[B, N] -> [B, M, N // hop], natural logarithms, not normalised"""
    margin = (WINDOW - hop) // 2
    x = torch.nn.functional.pad(samples[:, None], (margin, WINDOW - margin), mode="constant")[:, 0]
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(x, WINDOW, hop, window=window, center=False, return_complex=True)
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
    mel = filters(rate_hz, WINDOW) @ magnitude
    return mel[..., : samples.shape[1] // hop].clamp(min=QUIETEST).log()


def normalised(mel: Tensor) -> Tensor:
    return (mel - MEAN) / DEVIATION


def pitch(samples: Tensor, rate_hz: int, frames: int) -> Tensor:
    """[N] -> Hz [frames], 0 where there is no voice: the peak of the autocorrelation."""
    padded = torch.nn.functional.pad(samples, (WINDOW // 2 - HOP // 2, WINDOW))
    cut = padded.unfold(0, WINDOW, HOP)[:frames]  # [T, WINDOW]
    cut = cut - cut.mean(1, keepdim=True)
    power = torch.fft.rfft(cut, 2 * WINDOW).abs().square()
    raw = torch.fft.irfft(power)[:, :WINDOW]  # [T, lags]
    energy = cut.square()
    head = energy.cumsum(1).flip(1)  # of the first WINDOW - lag samples
    tail = energy.flip(1).cumsum(1).flip(1)
    scale = (head * tail).clamp(min=1e-12).sqrt()
    near = raw / scale
    low, high = rate_hz // 170, rate_hz // 65  # of a low voice
    part = near[:, low:high]
    best = part.max(1, keepdim=True).values
    first = (part > 0.9 * best).float().argmax(1)  # the shortest good lag, not its multiples
    peak = first.clone()
    for t in range(len(first)):  # up the hill that starts there
        i = int(first[t])
        while i + 1 < part.shape[1] and part[t, i + 1] > part[t, i]:
            i += 1
        peak[t] = i
    voiced = (best[:, 0] > 0.6) & (energy.mean(1) > 1e-5)
    return torch.where(voiced, rate_hz / (peak + low).float(), 0.0)
