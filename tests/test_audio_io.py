import io
import shutil
import subprocess
import tracemalloc
import wave

import numpy as np
import pytest
import soundfile
import soxr
from fake_engine import sound_file, tone

from omnispeech.audio.io import (
    decode_audio,
    encode_wav,
    pcm16_from_samples,
    samples_from_pcm16,
    wav_stream_header,
)
from omnispeech.errors import AudioError

RAMP = np.arange(-32768, 32768, dtype=np.int16)


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_16_khz_mono_is_unchanged_bit_for_bit(form: str) -> None:
    samples = decode_audio(sound_file(RAMP, form=form), max_seconds=10)
    np.testing.assert_array_equal(samples, RAMP.astype(np.float32) / 32768)
    assert samples.dtype == np.float32


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_any_format_rate_and_channel_count_becomes_16_khz_mono(
    form: str, channels: int, rate_hz: int
) -> None:
    data = sound_file(tone(0.5, rate_hz, channels), rate_hz, form)
    samples = decode_audio(data, max_seconds=1)
    assert len(samples) == pytest.approx(8_000, abs=1)
    middle = slice(2_000, 6_000)
    # Lossy formats and filter edges move single samples; the tone itself stays.
    np.testing.assert_allclose(samples[middle], tone(0.5)[middle], atol=0.06)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_any_sample_format_is_read(subtype: str) -> None:
    samples = decode_audio(sound_file(tone(0.1), subtype=subtype), max_seconds=1)
    np.testing.assert_allclose(samples, tone(0.1), atol=0.02)


def test_resampling_comes_before_mixing() -> None:
    stereo = np.random.default_rng(0).uniform(-1, 1, (300_000, 2)).astype(np.float32)
    samples = decode_audio(sound_file(stereo, 44_100, subtype="FLOAT"), max_seconds=10)
    expected = soxr.resample(stereo, 44_100, 16_000).mean(axis=1)
    np.testing.assert_array_equal(samples, np.clip(expected, -1, 1))


@pytest.mark.parametrize("seconds", [0.01, 0.1])
def test_b14_tiny_uploads_are_read(seconds: float) -> None:
    assert len(decode_audio(sound_file(tone(seconds)), max_seconds=1)) == seconds * 16_000


def refused(data: bytes, max_seconds: float = 1.0) -> str:
    with pytest.raises(AudioError) as error:
        decode_audio(data, max_seconds=max_seconds)
    return str(error.value)


def test_empty_bytes_are_refused() -> None:
    assert "empty (0 bytes)" in refused(b"")


def test_a_file_without_samples_is_refused() -> None:
    assert "no samples" in refused(sound_file(np.zeros(0)))


@pytest.mark.parametrize("data", [b"hello", bytes(1000), b"RIFF\xff\xff\xff\xffWAVEfmt "])
def test_bytes_that_are_no_sound_file_are_refused(data: bytes) -> None:
    assert "cannot be decoded" in refused(data)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(bad: float) -> None:
    samples = tone(0.1)
    samples[77] = bad
    assert "not numbers" in refused(sound_file(samples, subtype="FLOAT"))


def test_the_limit_itself_is_allowed_and_one_sample_more_is_refused() -> None:
    assert len(decode_audio(sound_file(tone(1.0)), max_seconds=1.0)) == 16_000
    message = refused(sound_file(np.zeros(16_001)), max_seconds=1.0)
    assert message == "the audio is longer than 1 s; send a shorter one"


def test_a_small_file_that_unpacks_to_hours_is_refused_without_the_memory() -> None:
    bomb = sound_file(np.zeros(4 * 3600 * 16_000, np.int16), form="FLAC")
    assert len(bomb) < 1_000_000
    tracemalloc.start()
    refused(bomb, max_seconds=120)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000  # 120 s are 8 MB; the whole is 920 MB


@pytest.mark.parametrize("rate_hz", [100, 2_000_000])
def test_absurd_sample_rates_are_refused(rate_hz: int) -> None:
    assert f"the sample rate is {rate_hz} Hz" in refused(sound_file(np.zeros(10), rate_hz))


def test_louder_than_full_scale_is_clipped() -> None:
    samples = decode_audio(sound_file(4 * tone(0.1), subtype="FLOAT"), max_seconds=1)
    assert (samples.min(), samples.max()) == (-1, 1)
    loud = pcm16_from_samples(np.array([2.0, -2.0], np.float32))
    assert np.frombuffer(loud, "<i2").tolist() == [32767, -32768]


def test_pcm16_survives_the_way_to_samples_and_back() -> None:
    pcm = RAMP.astype("<i2").tobytes()
    assert pcm16_from_samples(samples_from_pcm16(pcm)) == pcm


def test_wav_is_complete() -> None:
    with wave.open(io.BytesIO(encode_wav(RAMP.tobytes(), 22_050))) as file:
        assert file.getparams()[:4] == (1, 2, 22_050, len(RAMP))
        assert file.readframes(len(RAMP)) == RAMP.tobytes()


def test_streamed_wav_is_read_by_soundfile() -> None:
    samples, rate_hz = soundfile.read(
        io.BytesIO(wav_stream_header(22_050) + RAMP.tobytes()), dtype="int16"
    )
    assert rate_hz == 22_050
    np.testing.assert_array_equal(samples, RAMP)


@pytest.mark.skipif(shutil.which("sox") is None, reason="sox is not installed")
def test_streamed_wav_is_read_by_sox_without_a_warning() -> None:
    command = ["sox", "-t", "wav", "-", "-t", "raw", "-"]
    data = wav_stream_header(22_050) + RAMP.tobytes()
    run = subprocess.run(command, input=data, capture_output=True, check=True)
    assert (run.stdout, run.stderr) == (RAMP.tobytes(), b"")


def test_what_cannot_be_decoded_is_told_without_the_inside_of_the_server() -> None:
    message = refused(b"hello")
    assert message.startswith("the audio (5 bytes) cannot be decoded: ")
    assert "BytesIO" not in message and "Error" not in message


def test_a_file_that_ends_early_is_told_so() -> None:
    data = sound_file(tone(0.9), form="FLAC")
    message = refused(data[: len(data) // 2])
    assert "is damaged or ends early: flac decoder lost sync; send the whole file" in message
