import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from omnispeech.audio.resample import Resampler

NOISE = np.random.default_rng(0).uniform(-1, 1, (12_000, 2)).astype(np.float32)


@settings(max_examples=60)
@given(
    rate_hz=st.sampled_from([8_000, 22_050, 44_100, 48_000]),
    channels=st.sampled_from([1, 2]),
    cuts=st.lists(st.integers(0, 12_000), max_size=12),
)
def test_streaming_equals_offline_for_any_chunking(
    rate_hz: int, channels: int, cuts: list[int]
) -> None:
    sound = np.ascontiguousarray(NOISE if channels == 2 else NOISE[:, 0])
    resampler = Resampler(rate_hz, 16_000, channels)
    pieces = [resampler.push(piece) for piece in np.split(sound, sorted(cuts))]
    streamed = np.concatenate([*pieces, resampler.finish()])
    np.testing.assert_array_equal(streamed, soxr.resample(sound, rate_hz, 16_000))


def test_equal_rates_pass_through_bit_for_bit() -> None:
    resampler = Resampler(16_000, 16_000, channels=2)
    np.testing.assert_array_equal(resampler.push(NOISE), NOISE)
    assert resampler.finish().shape == (0, 2)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 22_050, 48_000])
def test_length_is_kept_in_seconds(rate_hz: int) -> None:
    resampler = Resampler(rate_hz, 16_000)
    samples = len(resampler.push(NOISE[:, 0].copy())) + len(resampler.finish())
    assert samples == pytest.approx(len(NOISE) * 16_000 / rate_hz, abs=1)


def test_resamplers_do_not_share_state() -> None:
    first, second = Resampler(48_000, 16_000), Resampler(48_000, 16_000)
    first.push(NOISE[:, 0].copy())
    assert not second.finish().any()
