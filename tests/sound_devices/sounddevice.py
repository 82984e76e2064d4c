"""In place of the package of that name: devices that keep time, and files behind them.

MICROPHONE: a WAV file that is spoken into it, then silence. LOUDSPEAKER: raw sound that was heard
is written there. A device whose variable is not set does not exist.
"""

import os
import threading
import time
import wave
from collections.abc import Callable

RATES = (16_000, 24_000)  # others are refused, as a device would
BUFFER_S = 0.05


class PortAudioError(Exception):
    pass


def query_devices(kind: str) -> dict[str, object]:
    variable = {"input": "MICROPHONE", "output": "LOUDSPEAKER"}[kind]
    if variable not in os.environ:
        raise ValueError("no such device")
    own = int(os.environ.get("DEVICE_RATE", RATES[0]))
    return {"name": kind, "default_samplerate": float(own)}


def check_input_settings(samplerate: int, channels: int, dtype: str) -> None:
    own = os.environ.get("DEVICE_RATE")
    if samplerate not in RATES or (own and samplerate != int(own)):
        raise PortAudioError("invalid sample rate")


check_output_settings = check_input_settings


class RawInputStream:
    def __init__(
        self, samplerate: int, channels: int, dtype: str, blocksize: int, callback: Callable
    ) -> None:
        self._rate_hz, self._frames, self._callback = samplerate, blocksize, callback
        self._ended = threading.Event()
        with wave.open(os.environ["MICROPHONE"]) as file:
            assert file.getframerate() == samplerate
            self._sound = file.readframes(file.getnframes())

    def __enter__(self) -> "RawInputStream":
        self._thread = threading.Thread(target=self._speak, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _speak(self) -> None:
        size, began_s, blocks = 2 * self._frames, time.monotonic(), 0
        while not self._ended.is_set():
            block = self._sound[blocks * size : (blocks + 1) * size]
            self._callback(block.ljust(size, b"\0"), self._frames, None, None)
            blocks += 1
            time.sleep(max(0, began_s + blocks * self._frames / self._rate_hz - time.monotonic()))


class RawOutputStream:
    latency = BUFFER_S

    def __init__(self, samplerate: int, channels: int, dtype: str, latency: str) -> None:
        self._rate_hz = samplerate
        self._heard_s = 0.0
        self._file = open(os.environ["LOUDSPEAKER"], "wb", buffering=0)  # noqa: SIM115

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def abort(self) -> None:
        self._heard_s = 0.0

    def write(self, pcm: bytes) -> None:
        self._file.write(pcm)
        now_s = time.monotonic()
        self._heard_s = max(self._heard_s, now_s) + len(pcm) / 2 / self._rate_hz
        time.sleep(max(0, self._heard_s - now_s - BUFFER_S))

    def close(self) -> None:
        self._file.close()
