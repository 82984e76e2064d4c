"""Formats of raw sound on a wire: bytes <-> samples. Mono, little endian, no header."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from omnispeech.audio import g711
from omnispeech.audio.io import pcm16_from_samples, samples_from_pcm16
from omnispeech.audio.resample import Samples
from omnispeech.errors import AudioError

PCM, ULAW, ALAW = "audio/pcm", "audio/pcmu", "audio/pcma"
RATES_HZ = {PCM: (8_000, 16_000, 24_000, 48_000), ULAW: (8_000,), ALAW: (8_000,)}


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """audio/pcm has 16 bits a sample; audio/pcmu and audio/pcma are the two laws of G.711."""

    type: str = PCM
    rate: int = 24_000

    def __post_init__(self) -> None:
        if self.type not in RATES_HZ:
            raise AudioError(f"unknown format {self.type!r}; known: {', '.join(RATES_HZ)}")
        if self.rate not in RATES_HZ[self.type]:
            allowed = ", ".join(map(str, RATES_HZ[self.type]))
            raise AudioError(f"{self.type} at {self.rate} Hz; allowed: {allowed} Hz")

    @property
    def bytes_per_sample(self) -> int:
        return 2 if self.type == PCM else 1

    def decode(self, data: bytes) -> Samples:
        """Whole samples -> [N] float32 in [-1, 1], at `rate`"""
        if self.type == PCM:
            return samples_from_pcm16(data)
        codes = np.frombuffer(data, np.uint8)
        values = g711.decode_ulaw(codes) if self.type == ULAW else g711.decode_alaw(codes)
        return samples_from_pcm16(values.astype("<i2").tobytes())

    def encode(self, samples: Samples) -> bytes:
        """[N] at `rate` -> bytes; louder than full scale is clipped"""
        pcm = pcm16_from_samples(samples)
        if self.type == PCM:
            return pcm
        values = np.frombuffer(pcm, "<i2").astype(np.int16)
        codes = g711.encode_ulaw(values) if self.type == ULAW else g711.encode_alaw(values)
        return codes.tobytes()

    def milliseconds(self, data_bytes: int) -> float:
        """How long so many bytes sound."""
        return data_bytes * 1000 / (self.bytes_per_sample * self.rate)

    def pieces(self, data: bytes, seconds: float) -> Iterator[bytes]:
        """`data` in order, cut between samples into pieces of at most so long"""
        size = max(1, int(seconds * self.rate)) * self.bytes_per_sample
        for start in range(0, len(data), size):
            yield data[start : start + size]

    def described(self) -> dict[str, str | int]:
        """As the Realtime protocol writes it: the rate of G.711 is not said."""
        return {"type": self.type, "rate": self.rate} if self.type == PCM else {"type": self.type}


PCM_24K = AudioFormat()
PCMU = AudioFormat(ULAW, 8_000)
PCMA = AudioFormat(ALAW, 8_000)
