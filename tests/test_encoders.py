import gc
import io
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fake_engine import tone

from omnispeech.audio.encoders import FORMATS, RATE_HZ, Encoder, encode
from omnispeech.audio.io import pcm16_from_samples

FROM_HZ = 22_050
SECONDS = 1.7
PCM = pcm16_from_samples(tone(SECONDS, FROM_HZ))
FRAMES = round(SECONDS * RATE_HZ)
FILES = sorted(FORMATS.keys() - {"pcm16"})
MP3_MOST_LONGER = 0.1 * RATE_HZ  # its encoder's delay, which only a whole file can tell


def in_pieces(form: str, pcm: bytes = PCM, samples: int = 2205) -> list[bytes]:
    encoder = Encoder(form, FROM_HZ)
    cuts = range(0, len(pcm), 2 * samples)
    return [*(encoder.push(pcm[at : at + 2 * samples]) for at in cuts), encoder.finish()]


def read(data: bytes) -> np.ndarray:
    samples, rate_hz = soundfile.read(io.BytesIO(data))
    assert rate_hz == RATE_HZ
    return samples


def loudest_hz(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum) * RATE_HZ / len(samples))


def check_length(frames: int, form: str) -> None:
    assert 0 <= frames - FRAMES <= (MP3_MOST_LONGER if form == "mp3" else 0)


@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize("samples", [1000, 7777, 10**6])
def test_pieces_joined_are_one_file_of_the_right_length_and_sound(form: str, samples: int) -> None:
    joined = read(b"".join(in_pieces(form, samples=samples)))
    check_length(len(joined), form)
    assert abs(loudest_hz(joined) - 300) < 2
    assert 0.4 < np.abs(joined[4000:-4000]).max() < 0.6


@pytest.mark.parametrize("form", FILES)
def test_a_whole_file_has_its_exact_length(form: str) -> None:
    samples = read(encode(PCM, form, FROM_HZ))
    assert len(samples) == FRAMES
    assert abs(loudest_hz(samples) - 300) < 2


@pytest.mark.skipif(shutil.which("sox") is None, reason="sox is not installed")
@pytest.mark.parametrize("form", sorted(set(FILES) - {"opus"}))  # sox as it is packaged lacks opus
def test_sox_reads_pieces_and_whole_files(form: str, tmp_path: Path) -> None:
    for number, data in enumerate((b"".join(in_pieces(form)), encode(PCM, form, FROM_HZ))):
        path = tmp_path / f"{number}.{form}"
        path.write_bytes(data)
        raw = subprocess.run(
            ["sox", path, "-t", "raw", "-e", "signed", "-b", "16", "-"], capture_output=True
        )
        assert raw.returncode == 0
        check_length(len(raw.stdout) // 2, form)


def test_pcm_is_at_24_khz_and_the_same_for_any_cutting() -> None:
    joined = {b"".join(in_pieces("pcm16", samples=n)) for n in (1, 999, 10**6)}
    assert len(joined) == 1
    assert len(joined.pop()) == 2 * FRAMES


def test_pcm_in_pieces_is_that_of_the_reference_resampler() -> None:
    pieces = np.frombuffer(b"".join(in_pieces("pcm16")), "<i2").astype(int)
    whole = np.frombuffer(encode(PCM, "pcm16", FROM_HZ), "<i2").astype(int)
    assert np.abs(pieces - whole)[200:-200].max() <= 2


def test_pcm_is_held_back_by_a_few_milliseconds_at_most() -> None:
    sent = itertools.accumulate(len(piece) for piece in in_pieces("pcm16")[:-1])
    assert all(
        0 <= 0.1 * pushed - bytes_ / 2 / RATE_HZ < 0.006 for pushed, bytes_ in enumerate(sent, 1)
    )


def test_there_is_one_wav_header_before_all_sound() -> None:
    pieces = in_pieces("wav")
    assert pieces[0].startswith(b"RIFF")
    assert b"".join(pieces).count(b"RIFF") == 1


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_what_can_be_heard_before_the_end_is_sent_before_it(form: str) -> None:
    before = sum(len(piece) for piece in in_pieces(form)[:-1])
    assert (before > 1000) == FORMATS[form].in_pieces


def test_the_bit_rate_of_an_mp3_tells_its_length() -> None:
    """Without the table that comes last, a variable one would tell a wrong length."""
    pieces = b"".join(in_pieces("mp3", PCM * 5))
    assert abs(soundfile.info(io.BytesIO(pieces)).duration - 5 * SECONDS) < 0.1


def test_sound_louder_than_full_scale_is_clipped_and_not_wrapped() -> None:
    square = pcm16_from_samples(np.sign(tone(1, FROM_HZ)))
    at_24k = np.frombuffer(encode(square, "pcm16", FROM_HZ), "<i2").astype(int)
    assert at_24k.max() == 32767
    # a sample that had gone round would be a jump from one end to the other and back
    assert (np.abs(np.diff(at_24k)) > 60_000).sum() <= 600


@pytest.mark.parametrize("form", ["pcm16", "wav"])
def test_a_reply_without_sound_is_an_empty_file(form: str) -> None:
    encoder = Encoder(form, FROM_HZ)
    assert len(encoder.finish()) == (44 if form == "wav" else 0)


@pytest.mark.parametrize("form", ["mp3", "opus", "flac"])
def test_an_encoder_that_is_dropped_leaves_nothing_behind(form: str) -> None:
    """What the garbage collector cannot end properly is an error of the tests."""
    encoder: Any = Encoder(form, FROM_HZ)
    encoder.push(PCM)
    encoder.itself = encoder  # only the collector can end it, in an order of its own
    del encoder
    assert gc.collect() > 0
