"""What was sent of the microphone or the pipe, on the server's clock: milliseconds of sound."""

from omnispeech.audio.io import SAMPLE_RATE_HZ

BYTES_A_MS = 2 * SAMPLE_RATE_HZ // 1000
KEPT_MS = 180_000  # longer than any turn


class Sent:
    """16-bit mono sound at 16 kHz that comes as it is spoken."""

    def __init__(self, from_ms: int = 0) -> None:
        self._sound = bytearray()
        self._first = from_ms * BYTES_A_MS  # byte of the clock where `_sound` begins
        self._last_s = 0.0

    @property
    def now_ms(self) -> int:
        return (self._first + len(self._sound)) // BYTES_A_MS

    def push(self, pcm: bytes, now_s: float) -> None:
        self._sound += pcm
        self._last_s = now_s
        gone = max(0, len(self._sound) - KEPT_MS * BYTES_A_MS)
        del self._sound[:gone]
        self._first += gone

    def cut(self, from_ms: int, to_ms: int) -> bytes:
        first, last = (max(0, ms * BYTES_A_MS - self._first) for ms in (from_ms, to_ms))
        return bytes(self._sound[first:last])

    def moment_s(self, ms: float) -> float:
        """When that was spoken, on the clock of `push`."""
        return self._last_s - (self.now_ms - ms) / 1000
