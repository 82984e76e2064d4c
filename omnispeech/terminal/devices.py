"""Microphone and loudspeaker, through the optional package sounddevice (extra `microphone`)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

from omnispeech.audio.io import SAMPLE_RATE_HZ, pcm16_from_samples, samples_from_pcm16
from omnispeech.audio.polyphase import LiveResampler
from omnispeech.client import ClientError
from omnispeech.terminal.player import RATE_HZ

Kind = Literal["input", "output"]
PIECE_S = 0.02


def find_sounddevice(kind: Kind) -> ModuleType | None:
    """The package, if it is installed and this machine has such a device."""
    try:
        import sounddevice
    except (ImportError, OSError):  # OSError: the PortAudio library is missing
        return None
    try:
        sounddevice.query_devices(kind=kind)
    except (ValueError, sounddevice.PortAudioError):
        return None
    return sounddevice


def usable_rate(sounddevice: ModuleType, kind: Kind, wanted_hz: int) -> int:
    """That rate if the device takes it, else the device's own."""
    check = getattr(sounddevice, f"check_{kind}_settings")
    try:
        check(samplerate=wanted_hz, channels=1, dtype="int16")
    except (ValueError, sounddevice.PortAudioError):
        return int(sounddevice.query_devices(kind=kind)["default_samplerate"])
    return wanted_hz


class Rate:
    """16-bit mono sound in pieces, from one rate to another. Equal rates pass untouched."""

    def __init__(self, from_hz: int, to_hz: int) -> None:
        self._resampler = None if from_hz == to_hz else LiveResampler(from_hz, to_hz)

    def push(self, pcm: bytes) -> bytes:
        if self._resampler is None:
            return pcm
        return pcm16_from_samples(self._resampler.push(samples_from_pcm16(pcm)))


@contextmanager
def microphone(sounddevice: ModuleType, hear: Callable[[bytes], None]) -> Iterator[None]:
    """hear: called in the thread of the device with sound at 16 kHz."""
    rate_hz = usable_rate(sounddevice, "input", SAMPLE_RATE_HZ)
    rate = Rate(rate_hz, SAMPLE_RATE_HZ)

    def heard(data: Any, *_: object) -> None:
        hear(rate.push(bytes(data)))

    try:
        stream = sounddevice.RawInputStream(
            samplerate=rate_hz,
            channels=1,
            dtype="int16",
            blocksize=int(PIECE_S * rate_hz),
            callback=heard,
        )
    except sounddevice.PortAudioError as exc:
        raise ClientError(f"the microphone cannot be opened: {exc}") from exc
    with stream:
        yield


class Loudspeaker:
    """A sink of the player; the sound of one reply follows on that of another without a gap."""

    def __init__(self, sounddevice: ModuleType) -> None:
        rate_hz = usable_rate(sounddevice, "output", RATE_HZ)
        self._rate_hz = rate_hz
        self._rate = Rate(RATE_HZ, rate_hz)
        try:
            self._stream = sounddevice.RawOutputStream(
                samplerate=rate_hz, channels=1, dtype="int16", latency="low"
            )
            self._stream.start()
        except sounddevice.PortAudioError as exc:
            raise ClientError(f"the loudspeaker cannot be opened: {exc}") from exc
        self.latency_s = float(self._stream.latency)

    def write(self, pcm: bytes) -> None:
        self._stream.write(self._rate.push(pcm))

    def drop(self) -> None:
        self._stream.abort()
        self._rate = Rate(RATE_HZ, self._rate_hz)
        self._stream.start()

    def close(self) -> None:
        time.sleep(self.latency_s)
        self._stream.stop()
        self._stream.close()
