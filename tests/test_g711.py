import io

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from omnispeech.audio.g711 import decode_alaw, decode_ulaw, encode_alaw, encode_ulaw

LAWS = {"ULAW": (encode_ulaw, decode_ulaw), "ALAW": (encode_alaw, decode_alaw)}
EVERY_SAMPLE = np.arange(-32_768, 32_768).astype(np.int16)
EVERY_CODE = np.arange(256, dtype=np.uint8)


def of_libsndfile(law: str, pcm: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    soundfile.write(file, pcm, 8000, format="RAW", subtype=law)
    return np.frombuffer(file.getvalue(), np.uint8)


@pytest.mark.parametrize("law", LAWS)
def test_every_code_is_decoded_as_libsndfile_does(law: str) -> None:
    file = io.BytesIO(EVERY_CODE.tobytes())
    raw = {"format": "RAW", "subtype": law, "samplerate": 8000, "channels": 1}
    expected, _ = soundfile.read(file, dtype="int16", **raw)
    np.testing.assert_array_equal(LAWS[law][1](EVERY_CODE), expected)


@pytest.mark.parametrize("law", LAWS)
def test_every_sample_is_encoded_as_libsndfile_does(law: str) -> None:
    np.testing.assert_array_equal(LAWS[law][0](EVERY_SAMPLE), of_libsndfile(law, EVERY_SAMPLE))


@pytest.mark.parametrize(
    ("law", "sample", "code"),
    [
        # ITU-T G.711, tables 1a to 2b: the virtual ends, the smallest values, an edge of segments
        ("ULAW", 32_767, 0x80),
        ("ULAW", -32_768, 0x00),
        ("ULAW", 0, 0xFF),
        ("ULAW", -4, 0x7E),
        ("ULAW", 31 * 4, 0xEF),
        ("ALAW", 32_767, 0xFF ^ 0x55),
        ("ALAW", -32_768, 0x7F ^ 0x55),
        ("ALAW", 0, 0x80 ^ 0x55),
        ("ALAW", -16, 0x01 ^ 0x55),
        ("ALAW", 512 * 8, 0xD0 ^ 0x55),
    ],
)
def test_values_of_the_standard(law: str, sample: int, code: int) -> None:
    assert LAWS[law][0](np.array([sample], np.int16))[0] == code


@pytest.mark.parametrize("law", LAWS)
def test_a_code_survives_decoding_and_encoding(law: str) -> None:
    """But for the negative zero of the mu-law: it is the same sample as the positive one."""
    encode, decode = LAWS[law]
    changed = EVERY_CODE[encode(decode(EVERY_CODE)) != EVERY_CODE]
    assert list(changed) == ([0x7F] if law == "ULAW" else [])


@pytest.mark.parametrize(("law", "loudest"), [("ULAW", 32_635), ("ALAW", 32_767)])
def test_the_error_is_at_most_half_a_step(law: str, loudest: int) -> None:
    encode, decode = LAWS[law]
    sample = EVERY_SAMPLE[np.abs(EVERY_SAMPLE.astype(int)) <= loudest].astype(int)
    error = np.abs(decode(encode(sample.astype(np.int16))).astype(int) - sample)
    assert (error <= (np.abs(sample) + 256) / 32).all()


@given(cut=st.integers(0, 65_536), law=st.sampled_from(sorted(LAWS)))
def test_a_stream_may_be_cut_anywhere(cut: int, law: str) -> None:
    encode, _ = LAWS[law]
    parts = [encode(EVERY_SAMPLE[:cut]), encode(EVERY_SAMPLE[cut:])]
    np.testing.assert_array_equal(np.concatenate(parts), encode(EVERY_SAMPLE))
