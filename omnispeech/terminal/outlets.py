"""Where spoken replies go if not to a loudspeaker: a WAV file, or standard output."""

import os
import time
import wave
from pathlib import Path

from omnispeech.terminal.player import BYTES_A_MS, RATE_HZ

AHEAD_S = 0.2  # of sound that is in the pipe: what is cut within it is still heard


class WavFile:
    """All replies, one after another. The file is whole whenever it is closed."""

    latency_s = 0.0

    def __init__(self, path: Path) -> None:
        self._file = wave.open(str(path), "wb")  # noqa: SIM115
        self._file.setnchannels(1)
        self._file.setsampwidth(2)
        self._file.setframerate(RATE_HZ)

    def write(self, pcm: bytes) -> None:
        self._file.writeframes(pcm)

    def drop(self) -> None: ...

    def close(self) -> None:
        self._file.close()


class Pipe:
    """Raw sound at the pace of its being heard, so that an interruption can stop it."""

    latency_s = AHEAD_S

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._heard_s = 0.0  # when all that was written will have been heard

    def write(self, pcm: bytes) -> None:
        rest = memoryview(pcm)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        now_s = time.monotonic()
        self._heard_s = max(self._heard_s, now_s) + len(pcm) / BYTES_A_MS / 1000
        time.sleep(max(0.0, self._heard_s - now_s - AHEAD_S))

    def drop(self) -> None:
        self._heard_s = 0.0

    def close(self) -> None: ...
