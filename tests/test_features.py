from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import WhisperFeatureExtractor

from omnispeech.audio.features import MelConfig, log_mel, mel_filters
from omnispeech.errors import AudioError, CheckpointError

GOLDEN = Path(__file__).parent / "golden" / "opens2s"
CONFIGS = [
    MelConfig(feature_size=128),
    MelConfig(feature_size=80, chunk_length=10),
    MelConfig(feature_size=40, n_fft=512, hop_length=200, chunk_length=5),
]


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


def extractor(config: MelConfig) -> WhisperFeatureExtractor:
    names = ("feature_size", "sampling_rate", "hop_length", "n_fft", "chunk_length")
    return WhisperFeatureExtractor(**{name: getattr(config, name) for name in names})


def extracted(clips: list[np.ndarray], config: MelConfig) -> dict[str, torch.Tensor]:
    """As the original calls it: padded to the longest, rounded up to whole chunks."""
    features = extractor(config)(
        clips,
        sampling_rate=config.sampling_rate,
        truncation=False,
        padding="longest",
        pad_to_multiple_of=config.chunk_samples,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return {"mel": features["input_features"], "mask": features["attention_mask"]}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_mel_filters_are_those_of_the_whisper_extractor(config: MelConfig) -> None:
    expected = torch.from_numpy(extractor(config).mel_filters.T).float()
    torch.testing.assert_close(mel_filters(config), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("seconds", [0.01, 2.0, 10.0, 11.3])
def test_log_mel_is_that_of_the_whisper_extractor(config: MelConfig, seconds: float) -> None:
    clip = noise(round(seconds * 16_000))
    expected = extracted([clip], config)
    torch.testing.assert_close(log_mel(clip, config), expected["mel"][0], rtol=0, atol=2e-5)
    assert config.valid_frames(len(clip)) == expected["mask"].sum()


def test_clips_of_one_request_match_the_extractor_even_where_a_chunk_is_exactly_full() -> None:
    config = MelConfig(feature_size=128, chunk_length=2)
    clips = [noise(32_000), noise(40_000, seed=1)]
    expected = extracted(clips, config)["mel"]
    for clip, mel in zip(clips, expected, strict=True):
        torch.testing.assert_close(log_mel(clip, config, longest=40_000), mel, rtol=0, atol=2e-5)


@given(samples=st.integers(1, 31_000), longest=st.integers(0, 200_000))
def test_a_longer_audio_in_the_request_leaves_the_valid_mel_as_it_is(
    samples: int, longest: int
) -> None:
    config = MelConfig(feature_size=20, chunk_length=2)
    clip = noise(samples)
    valid = config.valid_frames(samples)
    alone, together = log_mel(clip, config), log_mel(clip, config, longest=longest)
    torch.testing.assert_close(together[:, :valid], alone[:, :valid], rtol=0, atol=1e-6)
    assert together.shape[1] % 200 == 0 and together.shape[1] >= longest // 160


@pytest.mark.parametrize("case, waves", [("audio2s", ["chirp2s"]), ("twoturn", ["short5s"])])
def test_log_mel_matches_the_golden_windows(case: str, waves: list[str]) -> None:
    golden = load_file(GOLDEN / "expected-opens2s-tiny" / f"{case}.safetensors")
    samples, _ = soundfile.read(GOLDEN / "waves" / f"{waves[0]}.wav", dtype="float32")
    mel = log_mel(samples, MelConfig(feature_size=128))
    expected = golden["mel_0.0"]
    torch.testing.assert_close(mel[:, : expected.shape[1]], expected, rtol=0, atol=1e-4)


def test_the_maximum_is_taken_over_the_whole_clip_and_not_per_chunk() -> None:
    config = MelConfig(chunk_length=1)
    loud_at_the_end = np.concatenate([noise(16_000) * 1e-6, noise(16_000)])
    quiet = log_mel(loud_at_the_end, config)[:, :90]
    assert quiet.min() == quiet.max() == log_mel(loud_at_the_end, config).min()


def test_silence_is_constant() -> None:
    assert torch.equal(
        log_mel(np.zeros(800, np.float32), MelConfig()), torch.full((80, 3000), -1.5)
    )


def test_samples_may_be_an_array_or_a_tensor() -> None:
    clip = noise(3000)
    assert torch.equal(log_mel(clip, MelConfig()), log_mel(torch.from_numpy(clip), MelConfig()))


@pytest.mark.parametrize("clip", [np.zeros(0, np.float32), np.zeros((2, 9), np.float32)])
def test_a_clip_that_is_empty_or_not_mono_is_refused(clip: np.ndarray) -> None:
    with pytest.raises(AudioError, match=r"a clip of shape \[.*\]; send one channel"):
        log_mel(clip, MelConfig())


def test_foreign_keys_of_the_preprocessor_are_left_and_absent_ones_mean_its_defaults() -> None:
    raw = {"feature_size": 128, "processor_class": "Qwen2AudioProcessor", "n_samples": 480_000}
    assert MelConfig.from_dict(raw) == MelConfig(feature_size=128)
    assert MelConfig.from_dict({}) == MelConfig()


@pytest.mark.parametrize(
    "name, value",
    [
        ("sampling_rate", 8000),
        ("dither", 0.1),
        ("padding_side", "left"),
        ("padding_value", 1.0),
        ("hop_length", 0),
        ("chunk_length", "30"),
    ],
)
def test_a_preprocessor_that_does_something_else_is_refused(name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"preprocessor {name}={value!r}"):
        MelConfig.from_dict({name: value})
