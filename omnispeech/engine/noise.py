"""Where a vocoder stream gets its random numbers: its own generators, never the process's."""

import math
from typing import Protocol

import torch
from torch import Tensor

from omnispeech.models.speech_decoder import SpeechDecoder


class Noise(Protocol):
    """Columns are counted from the start of the reply (corrected) or the call (compatible)."""

    def start(self, first: int, frames: int) -> Tensor:
        """-> [1, M, frames] where the flow starts from"""
        ...

    def phases(self) -> Tensor:
        """-> [1, H] of the harmonics, in radians; the fundamental's is 0"""
        ...

    def sines(self, first: int, samples: int) -> Tensor:
        """-> [1, H, samples] that is added to the harmonics"""
        ...


class IndexedColumns:
    """Normal numbers whose column t depends on the seed and on t, and not on how it is asked for.

    Drawn on the CPU, so that a seed sounds the same on every device, in chunks of one size.
    Requests move to the right; what lies more than a chunk to the left of one is forgotten.
    """

    def __init__(self, rows: int, chunk: int, seed: int) -> None:
        self.chunk = chunk
        self.generator = torch.Generator().manual_seed(seed)
        self.kept = torch.empty(rows, 0)
        self.first = 0  # column of kept[:, 0]

    def take(self, first: int, count: int) -> Tensor:
        """-> [1, rows, count]"""
        assert first >= self.first, (first, self.first)
        missing = first + count - (self.first + self.kept.shape[1])
        self.kept = torch.cat((self.kept, *map(self._draw, range(-(-missing // self.chunk)))), 1)
        forgotten = max(0, (first - self.first) // self.chunk - 1) * self.chunk
        if forgotten:
            self.kept = self.kept[:, forgotten:].clone()
            self.first += forgotten
        at = first - self.first
        return self.kept[None, :, at : at + count]

    def _draw(self, _: int) -> Tensor:
        """-> [rows, chunk]"""
        return torch.randn((self.kept.shape[0], self.chunk), generator=self.generator)


class StreamNoise:
    """The corrected mode: what one frame or sample gets never changes while the reply grows."""

    def __init__(self, decoder: SpeechDecoder, seed: int) -> None:
        master = torch.Generator().manual_seed(seed)
        mels, harmonics, self._device = _shape(decoder)
        flow_seed, sine_seed = torch.randint(2**62, (2,), generator=master).tolist()
        self._phases = draw_phases(harmonics, master).to(self._device)
        self._start = IndexedColumns(mels, 256, flow_seed)
        self._sines = IndexedColumns(harmonics, 16384, sine_seed)

    def start(self, first: int, frames: int) -> Tensor:
        return self._start.take(first, frames).to(self._device)

    def phases(self) -> Tensor:
        return self._phases

    def sines(self, first: int, samples: int) -> Tensor:
        return self._sines.take(first, samples).to(self._device)


class OriginalNoise:
    """The compatible mode: seed 42 before every flow call, then the original's order of draws.

    The generator is private, so that nobody else is seeded; the phases come from the CPU even
    where the rest comes from the GPU, as in the original.
    """

    def __init__(self, decoder: SpeechDecoder) -> None:
        self._mels, self._harmonics, self._device = _shape(decoder)
        self._normal = torch.Generator(self._device)
        on_cpu = self._device.type == "cpu"
        self._uniform = self._normal if on_cpu else torch.Generator()

    def start(self, first: int, frames: int) -> Tensor:
        self._normal.manual_seed(42)
        self._uniform.manual_seed(42)
        return self._randn(self._mels, frames)

    def phases(self) -> Tensor:
        return draw_phases(self._harmonics, self._uniform).to(self._device)

    def sines(self, first: int, samples: int) -> Tensor:
        return self._randn(self._harmonics, samples)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn((1, *shape), generator=self._normal, device=self._device)


def draw_phases(harmonics: int, generator: torch.Generator) -> Tensor:
    """-> [1, H]"""
    phases = torch.rand((1, harmonics), generator=generator) * (2 * math.pi) - math.pi
    phases[:, 0] = 0
    return phases


def _shape(decoder: SpeechDecoder) -> tuple[int, int, torch.device]:
    """Mel bins, harmonics with the fundamental, device"""
    harmonics = decoder.hift.config.nb_harmonics + 1
    return decoder.flow.config.output_size, harmonics, decoder.device
