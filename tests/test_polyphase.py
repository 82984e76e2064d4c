import time

import numpy as np
import pytest
import soxr
from hypothesis import given
from hypothesis import strategies as st

from omnispeech.audio.polyphase import LiveResampler

# of the input: 24 and 48 kHz PCM, telephone; of the output: 22.05 kHz speech to each format
WAYS = [(24_000, 16_000), (48_000, 16_000), (8_000, 16_000)]
WAYS += [(22_050, 24_000), (22_050, 8_000), (22_050, 16_000), (22_050, 48_000)]
NOISE = np.random.default_rng(0).uniform(-1, 1, 6000).astype(np.float32)


def offline(sound: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    resampler = LiveResampler(from_hz, to_hz)
    return np.concatenate([resampler.push(sound), resampler.finish()])


def sine(rate_hz: int, hertz: float) -> np.ndarray:
    """One second"""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(rate_hz) / rate_hz)).astype(np.float32)


def db(signal: np.ndarray, error: np.ndarray) -> float:
    return 10 * np.log10((signal**2).mean() / (error**2).mean())


@given(way=st.sampled_from(WAYS), cuts=st.lists(st.integers(0, 6000), max_size=12))
def test_streaming_equals_offline_for_any_cutting(way: tuple[int, int], cuts: list[int]) -> None:
    resampler = LiveResampler(*way)
    pieces = [resampler.push(piece) for piece in np.split(NOISE, sorted(cuts))]
    streamed = np.concatenate([*pieces, resampler.finish()])
    np.testing.assert_array_equal(streamed, offline(NOISE, *way))


@given(way=st.sampled_from(WAYS), samples=st.integers(0, 3000))
def test_the_length_is_exact_to_a_sample(way: tuple[int, int], samples: int) -> None:
    assert len(offline(NOISE[:samples], *way)) == pytest.approx(samples * way[1] / way[0], abs=0.5)


@pytest.mark.parametrize(("from_hz", "to_hz"), WAYS)
@pytest.mark.parametrize("part", [0.02, 0.2, 0.4])
def test_a_sine_stays_the_sine(from_hz: int, to_hz: int, part: float) -> None:
    hertz = part * min(from_hz, to_hz)
    inner = slice(to_hz // 10, -to_hz // 10)
    out, expected = offline(sine(from_hz, hertz), from_hz, to_hz), sine(to_hz, hertz)
    assert db(expected[inner], (out - expected)[inner]) > 65


@pytest.mark.parametrize(("from_hz", "to_hz"), [way for way in WAYS if way[0] > way[1]])
def test_what_the_lower_rate_cannot_hold_does_not_fold_back(from_hz: int, to_hz: int) -> None:
    sound = sine(from_hz, 0.51 * to_hz)
    assert db(sound, offline(sound, from_hz, to_hz)[to_hz // 10 : -to_hz // 10]) > 80


@pytest.mark.parametrize(("from_hz", "to_hz"), WAYS)
def test_it_agrees_with_soxr(from_hz: int, to_hz: int) -> None:
    """On sound below 0.4 of the lower rate, edges included; soxr may make one sample less."""
    edge = np.hanning(from_hz).astype(np.float32)
    sound = sum(sine(from_hz, part * min(from_hz, to_hz)) for part in (0.01, 0.11, 0.31)) * edge
    expected = soxr.resample(sound, from_hz, to_hz)
    out = offline(sound, from_hz, to_hz)[: len(expected)]
    assert db(expected, out - expected) > 75


@pytest.mark.parametrize(("from_hz", "to_hz"), WAYS)
def test_only_half_the_filter_is_held_back(from_hz: int, to_hz: int) -> None:
    resampler, made_s, held_ms = LiveResampler(from_hz, to_hz), 0.0, []
    for index in range(1, 101):
        made_s += len(resampler.push(np.zeros(from_hz // 100, np.float32))) / to_hz
        held_ms.append(1000 * (index * (from_hz // 100) / from_hz - made_s))
    assert max(held_ms) < (6.2 if min(from_hz, to_hz) == 8000 else 3.2)
    assert min(held_ms) > 0


def test_equal_rates_pass_through_bit_for_bit() -> None:
    np.testing.assert_array_equal(offline(NOISE, 16_000, 16_000), NOISE)


def test_a_long_push_gives_the_same_sound() -> None:
    resampler = LiveResampler(24_000, 16_000)
    long = np.tile(NOISE, 20)
    out = [resampler.push(long), resampler.finish()]
    np.testing.assert_array_equal(np.concatenate(out)[:2000], offline(NOISE, 24_000, 16_000)[:2000])


def test_a_short_piece_of_24_khz_costs_little() -> None:
    """One a talk every 20 ms: below 1 % of a core. Here about 20 us."""
    resampler, piece = LiveResampler(24_000, 16_000), NOISE[:480]
    seconds = []
    for _ in range(100):
        begin = time.thread_time()
        resampler.push(piece)
        seconds.append(time.thread_time() - begin)
    assert np.median(seconds) < 200e-6
