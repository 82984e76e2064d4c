"""The sound of a reply as bytes of a format, made while the reply is.

All of it is mono at 24 kHz, the rate that clients of OpenAI's protocols expect.
"""

import io
from dataclasses import dataclass

import soundfile

from omnispeech.audio.io import (
    encode_wav,
    pcm16_from_samples,
    samples_from_pcm16,
    wav_stream_header,
)
from omnispeech.audio.polyphase import LiveResampler
from omnispeech.audio.resample import Resampler

RATE_HZ = 24_000
MP3_LEVEL = 0.5  # of 0 (160 kbit/s) to 1 (8 kbit/s): 80 kbit/s
OPUS_LEVEL = 0.8  # of 0 (256 kbit/s) to 1 (6 kbit/s): about 56 kbit/s


@dataclass(frozen=True, slots=True)
class Coding:
    """How libsndfile is asked for it."""

    container: str
    subtype: str
    level: float
    bitrate_mode: str | None = None


@dataclass(frozen=True, slots=True)
class SoundFormat:
    """in_pieces: can be heard before it is whole, and the pieces joined are a valid file."""

    media_type: str
    in_pieces: bool
    coding: Coding | None = None


# Without a table of contents, which comes last, the length of an MP3 is told by its bit rate: it
# must be constant. A FLAC stream of unknown length is legal, but libsndfile's `read` fails on it.
FORMATS = {
    "pcm16": SoundFormat(f"audio/pcm;rate={RATE_HZ};channels=1", True),
    "wav": SoundFormat("audio/wav", True),
    "mp3": SoundFormat("audio/mpeg", True, Coding("MP3", "MPEG_LAYER_III", MP3_LEVEL, "CONSTANT")),
    "opus": SoundFormat("audio/ogg;codecs=opus", True, Coding("OGG", "OPUS", OPUS_LEVEL)),
    "flac": SoundFormat("audio/flac", False, Coding("FLAC", "PCM_16", 0.5)),
}


class Encoder:
    """16-bit PCM in pieces -> bytes; joined they are one file. Not for the event loop: it computes.

    form: of FORMATS; one that does not go in pieces comes whole from `finish`.
    """

    def __init__(self, form: str, from_hz: int) -> None:
        self._resampler = LiveResampler(from_hz, RATE_HZ)
        self._waiting = wav_stream_header(RATE_HZ) if form == "wav" else b""
        coding = FORMATS[form].coding
        self._file = _File(coding, FORMATS[form].in_pieces) if coding else None

    def push(self, pcm: bytes) -> bytes:
        samples = self._resampler.push(samples_from_pcm16(pcm))
        return self._encoded(pcm16_from_samples(samples))

    def finish(self) -> bytes:
        """What is left; nothing may be pushed after it."""
        rest = self._encoded(pcm16_from_samples(self._resampler.finish()))
        return rest + (self._file.finish() if self._file else b"")

    def _encoded(self, pcm: bytes) -> bytes:
        if self._file:
            return self._file.push(pcm)
        head, self._waiting = self._waiting, b""
        return head + pcm


class _File:
    """A file that is being written, and how much of it has been taken.

    libsndfile goes back to the header when it closes: of what was taken, nothing changes any more.
    """

    def __init__(self, coding: Coding, in_pieces: bool) -> None:
        self._written = _Written()
        self._taken = 0
        self._in_pieces = in_pieces
        self._sound = _opened(self._written, coding)

    def push(self, pcm: bytes) -> bytes:
        self._sound.buffer_write(pcm, "int16")
        return self._new() if self._in_pieces else b""

    def finish(self) -> bytes:
        self._sound.close()
        return self._new()

    def _new(self) -> bytes:
        new = bytes(self._written.data[self._taken :])
        self._taken += len(new)
        return new


class _Written:
    """What libsndfile writes into. Of an encoder that is dropped, the garbage collector may end a
    BytesIO before the writer, which then fails; this has no end of its own."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._place = 0

    def write(self, new: bytes) -> int:
        self.data[self._place : self._place + len(new)] = new
        self._place += len(new)
        return len(new)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + (0, self._place, len(self.data))[whence]
        return self._place

    def tell(self) -> int:
        return self._place


def _opened(file: io.BytesIO | _Written, coding: Coding) -> soundfile.SoundFile:
    return soundfile.SoundFile(
        file,
        "w",
        samplerate=RATE_HZ,
        channels=1,
        format=coding.container,
        subtype=coding.subtype,
        compression_level=coding.level,
        bitrate_mode=coding.bitrate_mode,
    )


def encode(pcm: bytes, form: str, from_hz: int) -> bytes:
    """A whole file, its header with the right length."""
    resampler = Resampler(from_hz, RATE_HZ)
    parts = resampler.push(samples_from_pcm16(pcm)), resampler.finish()
    at_24k = b"".join(map(pcm16_from_samples, parts))
    if form == "wav":
        return encode_wav(at_24k, RATE_HZ)
    if (coding := FORMATS[form].coding) is None:
        return at_24k
    file = io.BytesIO()
    with _opened(file, coding) as sound:
        sound.buffer_write(at_24k, "int16")
    return file.getvalue()
