import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnispeech.audio.formats import PCM_24K, PCMA, PCMU, AudioFormat
from omnispeech.audio.io import pcm16_from_samples
from omnispeech.server.realtime.replies.output_audio import OutputAudio

HZ = 22_050
FORMATS = [PCM_24K, PCMU, PCMA, AudioFormat(rate=48_000)]
TONE = pcm16_from_samples((0.5 * np.sin(2 * np.pi * 300 * np.arange(2 * HZ) / HZ)).astype("f4"))


def made(pieces: list[bytes], format: AudioFormat) -> bytes:
    audio = OutputAudio(HZ, format)
    return b"".join([*(p for piece in pieces for p in audio.push(piece)), *audio.finish()])


@given(
    places=st.lists(st.integers(0, 2 * HZ), max_size=10).map(sorted),
    format=st.sampled_from(FORMATS),
)
def test_the_cutting_of_the_engine_is_not_heard(places: list[int], format: AudioFormat) -> None:
    pieces = np.split(np.frombuffer(TONE, "<i2"), places)
    assert made([piece.tobytes() for piece in pieces], format) == made([TONE], format)


@pytest.mark.parametrize("format", FORMATS)
def test_two_seconds_stay_two_seconds_of_the_same_tone(format: AudioFormat) -> None:
    data = made([TONE], format)
    assert format.milliseconds(len(data)) == 2000
    expected = 0.5 * np.sin(2 * np.pi * 300 * np.arange(2 * format.rate) / format.rate)
    error = np.abs(format.decode(data) - expected)[200:-200].max()
    assert error < (1e-4 if format.bytes_per_sample == 2 else 0.02)


def test_there_is_no_click_where_blocks_of_the_engine_meet() -> None:
    blocks = [TONE[i : i + 17_640] for i in range(0, len(TONE), 17_640)]
    steps = np.abs(np.diff(PCM_24K.decode(made(blocks, PCM_24K))))
    assert steps[200:-200].max() <= 0.5 * 2 * np.pi * 300 / 24_000 + 2 / 32_768


@pytest.mark.parametrize("format", FORMATS)
def test_frames_stay_far_below_a_mebibyte(format: AudioFormat) -> None:
    sizes = [len(base64.b64encode(p)) for p in OutputAudio(HZ, format).push(TONE * 30)]
    assert len(sizes) >= 119 and max(sizes) <= 64_000 < 2**20 / 8


def test_little_is_held_back() -> None:
    audio = OutputAudio(HZ, PCM_24K)
    at_once = PCM_24K.milliseconds(len(b"".join(audio.push(TONE))))
    assert 1997 < at_once < 2000
    assert at_once + PCM_24K.milliseconds(len(b"".join(audio.finish()))) == 2000


def test_the_engines_own_rate_passes_bit_for_bit() -> None:
    audio = OutputAudio(24_000, PCM_24K)
    assert b"".join(audio.push(TONE)) == TONE and list(audio.finish()) == []
