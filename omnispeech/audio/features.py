"""Samples -> what an audio encoder reads: log-mel features, or the samples themselves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omnispeech.errors import AudioError, CheckpointError

MAX_HZ = 8000.0  # upper edge of the mel filters
LINEAR_HZ_PER_MEL = 200.0 / 3.0  # Slaney scale: linear up to 1000 Hz
LOG_START_HZ = 1000.0
LOG_START_MEL = LOG_START_HZ / LINEAR_HZ_PER_MEL
LOG_STEP = math.log(6.4) / 27.0  # 27 mels from 1 kHz to 6.4 kHz
QUIETEST = 1e-10
DYNAMIC_RANGE = 8.0  # in log10 of the power: what lies deeper under the maximum is cut off

# What the rest of the program relies on; a preprocessor with another value needs other code.
ASSUMED = {
    "sampling_rate": 16_000,
    "dither": 0.0,
    "padding_value": 0.0,
    "padding_side": "right",
}


class FrontEnd(Protocol):
    """What stands between a clip and the audio encoder of a checkpoint."""

    def valid_frames(self, samples: int) -> int:
        """Frames of the features that are sound, of a clip of so many samples."""

    def features(self, samples: NDArray[np.float32], *, longest: int = 0) -> Tensor:
        """[N] in [-1, 1] -> [..., T]; longest: see `log_mel`"""


@dataclass(frozen=True, slots=True)
class Waveform:
    """For encoders that read the samples: each is a frame."""

    def valid_frames(self, samples: int) -> int:
        return samples

    def features(self, samples: NDArray[np.float32], *, longest: int = 0) -> Tensor:
        """[N] -> [N], whatever the others of the request are."""
        return torch.as_tensor(samples, dtype=torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class MelConfig:
    """What is used of audio/preprocessor_config.json; the defaults are those of its class.

    The features are those of the Whisper feature extractor.
    """

    feature_size: int = 80
    sampling_rate: int = 16_000
    hop_length: int = 160
    n_fft: int = 400
    chunk_length: int = 30  # seconds; a clip is padded to a multiple of it

    def __post_init__(self) -> None:
        for name in ("feature_size", "hop_length", "n_fft", "chunk_length"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise CheckpointError(
                    f"preprocessor {name}={value!r}; allowed: whole numbers of 1 or more"
                )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "MelConfig":
        """Takes what is known of a preprocessor_config.json and leaves the rest."""
        for name, value in ASSUMED.items():
            if raw.get(name, value) != value:
                raise CheckpointError(
                    f"preprocessor {name}={raw[name]!r}; this program can only do {value!r}"
                )
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__ if name in raw})

    @property
    def chunk_samples(self) -> int:
        return self.chunk_length * self.sampling_rate

    def padded_samples(self, samples: int) -> int:
        return max(1, -(-samples // self.chunk_samples)) * self.chunk_samples

    def valid_frames(self, samples: int) -> int:
        """Frames of a clip that begin inside it: the others are padding."""
        return -(-samples // self.hop_length)

    def features(self, samples: NDArray[np.float32], *, longest: int = 0) -> Tensor:
        """[N] -> [M, T]"""
        return log_mel(samples, self, longest=longest)


def log_mel(
    samples: NDArray[np.float32] | Tensor, config: MelConfig, *, longest: int = 0
) -> Tensor:
    """[N] in [-1, 1] -> [M, T], the clip padded with silence to a multiple of chunk_length.

    `longest`: samples of the longest clip of the request, to which the original pads them all.
    That changes a clip's own frames only where it ends within half a window of a full chunk:
    alone, its last frames would see the mirrored end of the clip instead of silence.
    """
    clip = torch.as_tensor(samples, dtype=torch.float32)  # [N]
    if clip.ndim != 1 or not len(clip):
        raise AudioError(f"a clip of shape {list(clip.shape)}; send one channel, 1 sample or more")
    total = config.padded_samples(max(len(clip), longest))
    clip = torch.nn.functional.pad(clip, (0, total - len(clip)))
    window = torch.hann_window(config.n_fft, device=clip.device)
    spectrum = torch.stft(
        clip, config.n_fft, config.hop_length, window=window, return_complex=True
    )  # [n_fft / 2 + 1, T + 1]
    power = spectrum[:, :-1].abs() ** 2  # [n_fft / 2 + 1, T]
    mel = mel_filters(config).to(clip.device) @ power  # [M, T]
    log = mel.clamp(min=QUIETEST).log10()
    return (log.clamp(min=log.max() - DYNAMIC_RANGE) + 4.0) / 4.0


@lru_cache(maxsize=8)
def mel_filters(config: MelConfig) -> Tensor:
    """[M, n_fft / 2 + 1]: triangles of equal area, evenly spaced on the Slaney scale."""
    bins = np.linspace(0.0, config.sampling_rate / 2, config.n_fft // 2 + 1)
    edges = _hertz(np.linspace(0.0, _mels(MAX_HZ), config.feature_size + 2))  # [M + 2]
    widths = np.diff(edges)[:, None]  # [M + 1, 1]
    slopes = (bins[None] - edges[:, None]) / np.concatenate([widths, widths[-1:]])
    rising = slopes[:-2]
    falling = (edges[2:, None] - bins[None]) / widths[1:]
    triangles = np.clip(np.minimum(rising, falling), 0.0, None)  # [M, n_fft / 2 + 1]
    area = 2.0 / (edges[2:] - edges[:-2])
    return torch.from_numpy((triangles * area[:, None]).astype(np.float32))


def _mels(hertz: float) -> float:
    """Of a frequency above 1 kHz."""
    return LOG_START_MEL + math.log(hertz / LOG_START_HZ) / LOG_STEP


def _hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = mels * LINEAR_HZ_PER_MEL
    logarithmic = LOG_START_HZ * np.exp(LOG_STEP * (mels - LOG_START_MEL))
    return np.where(mels < LOG_START_MEL, linear, logarithmic)
