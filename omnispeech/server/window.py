"""The last seconds of what somebody says."""

from omnispeech.audio.io import pcm16_from_samples, samples_from_pcm16
from omnispeech.engine.events import INPUT_RATE_HZ, Samples
from omnispeech.errors import RequestError

WINDOW_S = 30
SAMPLE_BYTES = 2


class RollingWindow:
    """PCM16, 16 kHz, mono goes in; the oldest falls out after 30 s."""

    def __init__(self) -> None:
        self._pcm = bytearray()

    @property
    def seconds(self) -> float:
        return len(self._pcm) / (SAMPLE_BYTES * INPUT_RATE_HZ)

    def append(self, pcm: bytes) -> None:
        if len(pcm) % SAMPLE_BYTES:
            raise RequestError(
                f"{len(pcm)} bytes are not whole samples; send an even number of bytes (PCM16)"
            )
        self._pcm += pcm
        self._forget_oldest()

    def last(self, seconds: float) -> Samples:
        """A copy: what is appended later does not change it."""
        samples = samples_from_pcm16(self._pcm)
        return samples[-int(seconds * INPUT_RATE_HZ) :]

    def put_back(self, samples: Samples) -> None:
        """Before what came since it was taken."""
        self._pcm[:0] = pcm16_from_samples(samples)
        self._forget_oldest()

    def take(self) -> Samples:
        """All of it; the window is empty afterwards."""
        samples = samples_from_pcm16(self._pcm)
        self._pcm.clear()
        return samples

    def _forget_oldest(self) -> None:
        del self._pcm[: -WINDOW_S * INPUT_RATE_HZ * SAMPLE_BYTES]
