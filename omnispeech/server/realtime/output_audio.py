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
        self._sent_bytes = 0

    @property
    def sent_ms(self) -> float:
        """Of the pieces taken from the iterators so far."""
        return self._format.milliseconds(self._sent_bytes)

    def push(self, pcm: bytes) -> Iterator[bytes]:
        """16-bit PCM of whole samples -> pieces of at most half a second"""
        samples = self._resampler.push(samples_from_pcm16(pcm))
        return self._counted(self._format.encode(samples))

    def finish(self) -> Iterator[bytes]:
        """What was still held; nothing may be pushed after it."""
        return self._counted(self._format.encode(self._resampler.finish()))

    def _counted(self, sound: bytes) -> Iterator[bytes]:
        for piece in self._format.pieces(sound, LONGEST_PIECE_S):
            self._sent_bytes += len(piece)
            yield piece
