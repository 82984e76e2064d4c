"""The sound of a reply, as a client wants it."""

from collections.abc import Iterator

from omnispeech.audio.formats import AudioFormat
from omnispeech.audio.io import samples_from_pcm16
from omnispeech.audio.polyphase import LiveResampler

# A second of 48 kHz PCM is 96 kB, and 128 kB as base64: frames stay far below 1 MiB.
LONGEST_PIECE_S = 0.5


class OutputAudio:
    """One reply: PCM at the engine's rate -> pieces in the format of the session.

    The joined pieces are the same for any cutting of the input. The resampler holds the last few
    milliseconds until `finish`; a reply that is broken off is not finished.
    """

    def __init__(self, from_hz: int, format: AudioFormat) -> None:
        self._format = format
        self._resampler = LiveResampler(from_hz, format.rate)

    def push(self, pcm: bytes) -> Iterator[bytes]:
        """16-bit PCM of whole samples -> pieces of at most half a second"""
        samples = self._resampler.push(samples_from_pcm16(pcm))
        return self._format.pieces(self._format.encode(samples), LONGEST_PIECE_S)

    def finish(self) -> Iterator[bytes]:
        """What was still held; nothing may be pushed after it."""
        return self._format.pieces(self._format.encode(self._resampler.finish()), LONGEST_PIECE_S)
