from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.engine.noise import IndexedColumns, OriginalNoise
from omnispeech.engine.vocoder import WindowedVocoder, hamming_blend, raised_cosine_blend
from omnispeech.models.hift import HiFT
from omnispeech.models.speech_decoder import SpeechDecoder

GOLDEN = Path(__file__).parent / "golden" / "decoder"
HOP = 256


@pytest.fixture(scope="module")
def decoder() -> SpeechDecoder:
    return load_decoder(GOLDEN, convert=False)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
@settings(max_examples=25)
def test_noise_of_a_column_does_not_depend_on_how_it_is_asked_for(sizes: list[int]) -> None:
    whole = IndexedColumns(3, 16, 7).take(0, sum(sizes))
    columns = IndexedColumns(3, 16, 7)
    first = 0
    for size in sizes:
        assert torch.equal(columns.take(first, size), whole[:, :, first : first + size])
        first += size


def test_noise_that_moved_on_keeps_a_chunk_of_the_past() -> None:
    columns = IndexedColumns(2, 16, 7)
    whole = IndexedColumns(2, 16, 7).take(0, 200)
    assert torch.equal(columns.take(100, 50), whole[:, :, 100:150])
    assert torch.equal(columns.take(90, 100), whole[:, :, 90:190])
    assert columns.first >= 64 and columns.kept.shape[1] <= 128


def test_original_noise_is_drawn_in_the_original_order(decoder: SpeechDecoder) -> None:
    noise = OriginalNoise(decoder)
    generator = torch.Generator().manual_seed(42)
    for _ in range(2):  # seeded again before every call
        assert torch.equal(noise.start(9, 5), torch.randn((1, 80, 5), generator=generator))
        phases = torch.rand((1, 9), generator=generator) * 2 * torch.pi - torch.pi
        torch.testing.assert_close(noise.phases()[:, 1:], phases[:, 1:])
        assert torch.equal(noise.sines(3, 64), torch.randn((1, 9, 64), generator=generator))
        generator.manual_seed(42)


def test_blend_weights_sum_to_one_in_every_frame() -> None:
    level = torch.full((1, 80, 34), -6.0)
    blended = raised_cosine_blend(level, level.repeat(1, 1, 2))
    torch.testing.assert_close(blended, level.repeat(1, 1, 2))


def test_blend_goes_from_the_old_frames_to_the_new() -> None:
    blended = raised_cosine_blend(torch.zeros(1, 1, 34), torch.ones(1, 1, 40))[0, 0]
    assert (blended.diff() >= 0).all() and blended[0] < 0.01 and (blended[33:] > 0.99).all()


def test_hamming_blend_raises_the_level_as_the_original_does() -> None:
    level = torch.ones(1, 80, 34)
    blended = hamming_blend(level, level)
    assert 1.05 < blended.min() < blended.max() < 1.08
    assert torch.equal(level, torch.ones(1, 80, 34))  # nothing is written in place


class ExactNoise:
    """Noise in float64, by absolute sample."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.columns = torch.randn(1, 9, 120 * HOP, generator=generator, dtype=torch.float64)

    def start(self, first: int, frames: int) -> Tensor:
        raise NotImplementedError

    def phases(self) -> Tensor:
        return torch.linspace(0, 3, 9, dtype=torch.float64)[None]

    def sines(self, first: int, samples: int) -> Tensor:
        return self.columns[:, :, first : first + samples]


@pytest.fixture(scope="module")
def exact_hift() -> HiFT:
    return load_decoder(GOLDEN, convert=False).hift.double()


def in_windows(hift: HiFT, mel: Tensor, sizes: list[int], ahead: int) -> Tensor:
    vocoder = WindowedVocoder(hift, ExactNoise())
    with torch.inference_mode():
        parts, start = [], 0
        for size in sizes:
            stop = start + size
            parts.append(vocoder.speak(mel[:, :, start:stop], mel[:, :, stop : stop + ahead]))
            start = stop
        return torch.cat(parts, dim=1)


def some_mel(frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(1, 80, frames, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "sizes", [[60, 60], [1] * 30, [34, 69, 17], [100, 1, 19], [5, 50, 2, 60], [120]]
)
def test_vocoder_in_windows_equals_the_full_run_with_carried_phase(
    exact_hift: HiFT, sizes: list[int]
) -> None:
    mel = some_mel(sum(sizes))
    whole = in_windows(exact_hift, mel, [sum(sizes)], 0)
    # rounding only: history and look-ahead cover the whole reach; in float64, where a sum of
    # thousands of cycles is still good to 1e-12 and the filter makes up to 1e-9 of that
    torch.testing.assert_close(in_windows(exact_hift, mel, sizes, 19), whole, atol=1e-7, rtol=0)


def test_vocoder_in_windows_equals_the_full_run_in_float32(decoder: SpeechDecoder) -> None:
    class Noise(ExactNoise):
        def __init__(self) -> None:
            super().__init__()
            self.columns = self.columns.float()

        def phases(self) -> Tensor:
            return super().phases().float()

    mel, hift = some_mel(120).float(), decoder.hift
    with torch.inference_mode():
        whole = WindowedVocoder(hift, Noise()).speak(mel, mel[:, :, :0])
        windows = WindowedVocoder(hift, Noise())
        cuts = range(0, 120, 20)
        parts = [windows.speak(mel[:, :, k : k + 20], mel[:, :, k + 20 : k + 40]) for k in cuts]
    # rounding of the pitch adds up in the phase
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-3, rtol=0)


def test_vocoder_without_look_ahead_would_be_wrong_at_the_seam(exact_hift: HiFT) -> None:
    mel = some_mel(60)
    whole = in_windows(exact_hift, mel, [60], 0)
    assert (in_windows(exact_hift, mel, [30, 30], 0) - whole).abs().max() > 1e-3
