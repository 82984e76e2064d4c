"""Microphone and loudspeaker, through the optional package sounddevice (extra `microphone`)."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

from omnispeech.audio.io import SAMPLE_RATE_HZ, encode_wav

Block = tuple[bytes, int]  # PCM16 mono, and its rate


def find_sounddevice(kind: Literal["input", "output"]) -> ModuleType | None:
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


def record(sounddevice: ModuleType, wait: Callable[[], object]) -> bytes:
    """A WAV file of what is said until `wait` returns."""
    parts: list[bytes] = []
    with sounddevice.RawInputStream(
        samplerate=SAMPLE_RATE_HZ,
        channels=1,
        dtype="int16",
        callback=lambda data, *_: parts.append(bytes(data)),
    ):
        wait()
    return encode_wav(b"".join(parts), SAMPLE_RATE_HZ)


@contextmanager
def playing(sounddevice: ModuleType) -> Iterator[Callable[[bytes, int], None]]:
    """Gives a function that queues a block; leaving waits until all of them were heard."""
    blocks: queue.Queue[Block | None] = queue.Queue()
    thread = threading.Thread(target=_play, args=(sounddevice, blocks), daemon=True)
    thread.start()
    try:
        yield lambda pcm, rate_hz: blocks.put((pcm, rate_hz))
    finally:
        blocks.put(None)
        thread.join()


def _play(sounddevice: ModuleType, blocks: queue.Queue[Block | None]) -> None:
    first = blocks.get()
    if first is None:
        return
    pcm, rate_hz = first
    with sounddevice.RawOutputStream(samplerate=rate_hz, channels=1, dtype="int16") as stream:
        stream.write(pcm)
        while (block := blocks.get()) is not None:
            stream.write(block[0])
