"""Sound files and raw PCM <-> samples: [N] float32 in [-1, 1]."""

import io
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from omnispeech.audio.resample import Resampler, Samples
from omnispeech.errors import AudioError

SAMPLE_RATE_HZ = 16_000  # what the models hear
LOWEST_RATE_HZ = 1_000
HIGHEST_RATE_HZ = 768_000
BLOCK_VALUES = 1 << 18  # read at a time, all channels together: 1 MB
PCM16_SCALE = 32768.0

# The length of a stream that is still being made is not known. This is the value sox itself
# writes into a pipe; 0xFFFFFFFF is read as well, but sox then warns of a premature end.
UNKNOWN_LENGTH = 0x7FFFF000
WAV_HEADER_BYTES = 44


def decode_audio(data: bytes, *, max_seconds: float) -> Samples:
    """A file of any format, rate and channel count that libsndfile reads -> 16 kHz mono.

    The file is unpacked block by block: one that unpacks to hours costs no memory.
    """
    if not data:
        raise AudioError("the audio is empty (0 bytes); send a WAV, FLAC, OGG or MP3 file")
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.SoundFileError as exc:
        raise AudioError(
            f"the audio ({len(data)} bytes) cannot be decoded: {_reason(exc)}; "
            "send a WAV, FLAC, OGG or MP3 file"
        ) from exc
    try:
        with file:
            samples = np.concatenate(list(_mono_blocks(file, max_seconds)))
    except soundfile.SoundFileError as exc:
        raise AudioError(
            f"the audio ({len(data)} bytes) is damaged or ends early: {_reason(exc)}; "
            "send the whole file"
        ) from exc
    if not len(samples):
        raise AudioError("the audio has no samples; send at least a tenth of a second of sound")
    return samples


def audio_blocks(path: Path) -> Iterator[Samples]:
    """A file of any length, as `decode_audio` reads it, block by block: [N] each, some empty.

    Raises AudioError where it cannot be read on.
    """
    try:
        with soundfile.SoundFile(path) as file:
            yield from _mono_blocks(file, math.inf)
    except soundfile.SoundFileError as exc:
        raise AudioError(
            f"the audio cannot be decoded, or not to its end: {_reason(exc)}; bring the whole file"
        ) from exc


def _reason(exc: Exception) -> str:
    """In the words of libsndfile; soundfile puts the address of our buffer before them."""
    words = getattr(exc, "error_string", str(exc)).rstrip(".")
    return str(words).removeprefix("Error : ").removeprefix("Error in ")


def _mono_blocks(file: soundfile.SoundFile, max_seconds: float) -> Iterator[Samples]:
    """Resampled first, then mixed, as the original does."""
    rate_hz = file.samplerate
    if not LOWEST_RATE_HZ <= rate_hz <= HIGHEST_RATE_HZ:
        raise AudioError(
            f"the sample rate is {rate_hz} Hz; send {LOWEST_RATE_HZ} to {HIGHEST_RATE_HZ} Hz"
        )
    resampler = Resampler(rate_hz, SAMPLE_RATE_HZ, file.channels)
    frames = max(1, BLOCK_VALUES // file.channels)
    frames_left = max_seconds * rate_hz
    while len(block := file.read(frames, dtype="float32", always_2d=file.channels > 1)):
        frames_left -= len(block)
        if frames_left < 0:
            raise AudioError(f"the audio is longer than {max_seconds:g} s; send a shorter one")
        if not np.isfinite(block).all():
            raise AudioError("the audio has samples that are not numbers; send finite samples")
        yield _mono(resampler.push(block))
    yield _mono(resampler.finish())


def _mono(block: Samples) -> Samples:
    """[N] or [N, C] -> [N]"""
    mixed = block if block.ndim == 1 else block.mean(axis=1)
    return np.clip(mixed, -1.0, 1.0)


def pcm16_from_samples(samples: Samples) -> bytes:
    """Louder than full scale is clipped."""
    scaled = np.rint(samples * PCM16_SCALE)
    return np.clip(scaled, -PCM16_SCALE, PCM16_SCALE - 1).astype("<i2").tobytes()


def samples_from_pcm16(pcm: bytes | bytearray) -> Samples:
    """16-bit little endian; always a copy."""
    return np.frombuffer(pcm, "<i2").astype(np.float32) / np.float32(PCM16_SCALE)


def encode_wav(pcm: bytes, rate_hz: int) -> bytes:
    """A complete WAV file of 16-bit mono PCM."""
    return _wav_header(rate_hz, len(pcm)) + pcm


def wav_stream_header(rate_hz: int) -> bytes:
    """The start of a 16-bit mono WAV file whose length is not known yet; PCM follows."""
    return _wav_header(rate_hz, UNKNOWN_LENGTH)


def _wav_header(rate_hz: int, data_bytes: int) -> bytes:
    riff = struct.pack("<4sI4s", b"RIFF", WAV_HEADER_BYTES - 8 + data_bytes, b"WAVE")
    pcm, channels, frame_bytes, bits = 1, 1, 2, 16
    layout = (pcm, channels, rate_hz, rate_hz * frame_bytes, frame_bytes, bits)
    return riff + struct.pack("<4sIHHIIHH4sI", b"fmt ", 16, *layout, b"data", data_bytes)
