import numpy as np
import pytest

from omnispeech.audio.formats import PCM_24K, PCMA, PCMU, AudioFormat
from omnispeech.errors import AudioError

SINE = (0.5 * np.sin(np.arange(8000) * 0.05)).astype(np.float32)


@pytest.mark.parametrize("format", [PCM_24K, PCMU, PCMA])
def test_sound_survives_its_format(format: AudioFormat) -> None:
    error = format.decode(format.encode(SINE)) - SINE
    assert np.abs(error).max() < (2e-5 if format is PCM_24K else 0.02)


def test_pcm_is_little_endian_and_clipped() -> None:
    assert PCM_24K.encode(np.array([0.5, -1.0, 3.0], np.float32)) == b"\x00\x40\x00\x80\xff\x7f"


@pytest.mark.parametrize(("format", "size"), [(PCM_24K, 48_000), (PCMU, 8_000), (PCMA, 8_000)])
def test_a_second_has_so_many_bytes(format: AudioFormat, size: int) -> None:
    assert format.milliseconds(size) == 1000
    pieces = list(format.pieces(bytes(size), 0.3))
    assert b"".join(pieces) == bytes(size)
    assert [round(format.milliseconds(len(piece))) for piece in pieces] == [300, 300, 300, 100]


def test_the_protocol_tells_the_rate_of_pcm_alone() -> None:
    assert PCM_24K.described() == {"type": "audio/pcm", "rate": 24_000}
    assert PCMU.described() == {"type": "audio/pcmu"}


@pytest.mark.parametrize(("kind", "rate"), [("audio/opus", 48_000), ("audio/pcmu", 16_000)])
def test_what_is_no_format_is_refused_with_those_that_are(kind: str, rate: int) -> None:
    with pytest.raises(AudioError, match="audio/pcm.*|allowed: 8000 Hz"):
        AudioFormat(kind, rate)
