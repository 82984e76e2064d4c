import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnispeech.audio.formats import PCM_24K, PCMA, PCMU, AudioFormat
from omnispeech.errors import AudioError
from omnispeech.server.realtime.hearing.input_audio import InputAudio

PCM_16K = AudioFormat(rate=16_000)
TONE = (0.5 * np.sin(2 * np.pi * 300 * np.arange(24_000) / 24_000)).astype(np.float32)
SECOND = PCM_24K.encode(TONE)  # 48 kB


def committed(pieces: list[bytes], format: AudioFormat = PCM_24K) -> np.ndarray:
    audio = InputAudio(format, max_s=60)
    new = np.concatenate([np.zeros(0, np.float32), *map(audio.append, pieces)])
    sound = emptied(audio)
    np.testing.assert_array_equal(sound[: len(new)], new)
    return sound


def emptied(audio: InputAudio) -> np.ndarray:
    sound = audio.held()
    audio.clear()
    return sound


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(places), len(data)]
    return [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@given(places=st.lists(st.integers(0, 48_000), max_size=10))
def test_a_stream_may_be_cut_anywhere_even_through_a_sample(places: list[int]) -> None:
    np.testing.assert_array_equal(committed(cut(SECOND, places)), committed([SECOND]))


@pytest.mark.parametrize("format", [PCM_24K, PCM_16K, PCMU, PCMA])
def test_a_second_of_any_format_is_a_second_of_the_same_tone(format: AudioFormat) -> None:
    at_rate = 0.5 * np.sin(2 * np.pi * 300 * np.arange(format.rate) / format.rate)
    sound = committed(list(format.pieces(format.encode(at_rate.astype(np.float32)), 0.02)), format)
    assert len(sound) == 16_000
    expected = 0.5 * np.sin(2 * np.pi * 300 * np.arange(16_000) / 16_000)
    assert np.abs(sound - expected)[200:-200].max() < (
        1e-3 if format.bytes_per_sample == 2 else 0.02
    )


def test_looking_at_what_is_held_changes_nothing() -> None:
    audio = InputAudio(PCM_24K, max_s=60)
    for piece in PCM_24K.pieces(SECOND, 0.1):
        audio.append(piece)
        audio.held()
    np.testing.assert_array_equal(audio.held(), committed([SECOND]))


def test_there_is_no_click_where_appends_meet() -> None:
    steps = np.abs(np.diff(committed(list(PCM_24K.pieces(SECOND, 0.02)))))
    assert steps[200:-200].max() <= 1.001 * 0.5 * 2 * np.pi * 300 / 16_000


def test_loud_edges_stay_within_full_scale() -> None:
    square = np.sign(TONE)
    assert np.abs(committed([PCM_24K.encode(square)])).max() == 1.0


def test_the_clock_goes_on_whatever_is_committed_or_cleared() -> None:
    audio = InputAudio(PCM_24K, max_s=60)
    audio.append(SECOND)
    assert audio.clock_ms == pytest.approx(997, abs=1)  # the resampler holds 3 ms
    emptied(audio)
    assert (audio.clock_ms, audio.held_ms) == (1000, 0)
    audio.append(SECOND)
    audio.clear()
    assert (audio.clock_ms, audio.held_ms) == (2000, 0)
    assert len(emptied(audio)) == 0


def test_sound_is_found_by_the_clock() -> None:
    audio = InputAudio(PCM_16K, max_s=60)
    ramp = np.arange(16_000, dtype=np.float32) / 32_768
    for piece in PCM_16K.pieces(PCM_16K.encode(ramp), 0.02):
        audio.append(piece)
    np.testing.assert_array_equal(audio.peek(100, 200), ramp[1600:3200])
    np.testing.assert_array_equal(audio.take(100, 200), ramp[1600:3200])
    np.testing.assert_array_equal(audio.peek(0, 300), ramp[3200:4800])
    np.testing.assert_array_equal(audio.take(900, 5000), ramp[14_400:])
    assert audio.held_ms == 0


def test_silence_that_is_forgotten_costs_no_memory_and_no_room() -> None:
    audio = InputAudio(PCM_16K, max_s=1)
    for _ in range(500):
        audio.append(bytes(640))  # 20 ms
        audio.forget(audio.clock_ms - 305)
        assert audio.held_ms <= 305
        assert sum(piece.base is None for piece in audio._pieces) == len(audio._pieces) <= 16
    assert audio.clock_ms == 10_000


def test_a_full_buffer_refuses_and_keeps_what_it_had() -> None:
    audio = InputAudio(PCM_24K, max_s=2.5)
    audio.append(SECOND)
    audio.append(SECOND)
    with pytest.raises(AudioError, match="would hold 3.0 s; at most 2.5 s.*commit or clear"):
        audio.append(SECOND)
    assert len(emptied(audio)) == 32_000
    audio.append(SECOND)


def test_another_format_goes_on_with_the_same_clock() -> None:
    audio = InputAudio(PCM_24K, max_s=60)
    new = [audio.append(SECOND)]
    audio.change_format(PCMU)
    new += [audio.append(PCMU.encode(np.zeros(8000, np.float32)))]
    sound = emptied(audio)
    assert (len(sound), audio.clock_ms) == (32_000, 2000)
    joined = np.concatenate(new)
    np.testing.assert_array_equal(sound[: len(joined)], joined)
    assert np.abs(sound[15_900:16_000]).max() > 0.4 and not np.abs(sound[16_100:]).max() > 1e-3


def test_the_same_format_again_changes_nothing() -> None:
    audio = InputAudio(PCM_24K, max_s=60)
    new = [audio.append(SECOND[:24_001])]
    audio.change_format(AudioFormat())
    new += [audio.append(SECOND[24_001:])]
    np.testing.assert_array_equal(emptied(audio), committed([SECOND]))


def test_half_a_sample_at_the_end_of_a_clip_does_not_spoil_the_next() -> None:
    audio = InputAudio(PCM_24K, max_s=60)
    audio.append(SECOND + b"\x01")
    assert len(emptied(audio)) == 16_000
    audio.append(SECOND)
    np.testing.assert_array_equal(emptied(audio), committed([SECOND]))
