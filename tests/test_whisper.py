from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2AudioEncoder as TransformersQwen2AudioEncoder
from transformers import Qwen2AudioEncoderConfig, WhisperConfig
from transformers.models.whisper.modeling_whisper import (
    WhisperEncoder as TransformersWhisperEncoder,
)

from omnispeech.checkpoint.files import build_on_meta
from omnispeech.errors import CheckpointError
from omnispeech.models.whisper import ENCODERS, EncoderConfig, WhisperEncoder

SIZES: dict[str, Any] = {
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "num_mel_bins": 10,
    "max_source_positions": 30,
}
ORACLES = {
    "qwen2_audio_encoder": (TransformersQwen2AudioEncoder, Qwen2AudioEncoderConfig),
    "whisper": (TransformersWhisperEncoder, WhisperConfig),
}


def build(model_type: str = "qwen2_audio_encoder", **changes: Any) -> WhisperEncoder:
    torch.manual_seed(0)
    config = EncoderConfig.from_dict(SIZES | changes | {"model_type": model_type})
    return ENCODERS[model_type](config).eval().requires_grad_(False)


@pytest.mark.parametrize("model_type", ORACLES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_function": "relu"},
        {"scale_embedding": True},
        {"max_source_positions": 500, "num_mel_bins": 80},
        {"d_model": 32, "encoder_attention_heads": 4, "encoder_layers": 1},
    ],
    ids=str,
)
def test_encoder_equals_that_of_transformers(model_type: str, changes: dict[str, Any]) -> None:
    encoder = build(model_type, **changes)
    make, make_config = ORACLES[model_type]
    oracle = make(make_config(**SIZES | changes)).eval()
    oracle.load_state_dict(encoder.state_dict(), strict=True)
    mel = torch.randn(2, encoder.config.num_mel_bins, encoder.segment_frames)
    with torch.no_grad():
        expected = oracle(mel).last_hidden_state
    torch.testing.assert_close(encoder(mel), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "model_type, frames, length",
    [
        ("qwen2_audio_encoder", 200, 50),
        ("qwen2_audio_encoder", 3000, 750),
        ("qwen2_audio_encoder", 3120, 780),
        ("qwen2_audio_encoder", 0, 0),
        ("qwen2_audio_encoder", 1, 0),
        ("qwen2_audio_encoder", 3, 1),
        ("whisper", 200, 100),
        ("whisper", 3120, 1560),
        ("whisper", 1, 1),
    ],
)
def test_output_length_follows_the_formula(model_type: str, frames: int, length: int) -> None:
    assert build(model_type, max_source_positions=1500).output_length(frames) == length


def test_output_length_is_summed_over_segments_that_pool_to_an_odd_number() -> None:
    encoder = build(max_source_positions=31)  # 62 mel frames -> 31 -> 15
    assert encoder.output_length(124) == 30 == len(encoder.encode(torch.zeros(10, 124), 124))


@given(st.sampled_from(list(ORACLES)), st.integers(1, 200))
def test_encode_gives_whole_segments_that_hold_the_valid_frames(kind: str, valid: int) -> None:
    encoder = build(kind)
    frames = encoder.encode(torch.zeros(10, 240), valid)
    per_segment = 15 if encoder.pools else 30
    assert len(frames) == -(-valid // 60) * per_segment >= encoder.output_length(valid)


def test_segments_without_valid_frames_are_not_computed() -> None:
    encoder, rows = build(), []
    encoder.layers[0].register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    mel = torch.randn(10, 180)
    encoder.encode(mel, 61)
    mel[:, 120:] = torch.nan
    assert encoder.encode(mel, 120).isfinite().all()
    assert rows == [2, 2]


def test_a_segment_does_not_depend_on_the_segments_beside_it() -> None:
    encoder, mel = build(), torch.randn(10, 180)
    alone = torch.cat([encoder.encode(part, 60) for part in mel.split(60, dim=1)])
    torch.testing.assert_close(encoder.encode(mel, 180), alone, rtol=0, atol=1e-5)


def test_features_are_cast_to_the_precision_of_the_weights() -> None:
    assert build().to(torch.bfloat16).encode(torch.randn(10, 60), 60).dtype == torch.bfloat16


def test_a_mel_shorter_than_its_segments_is_refused() -> None:
    with pytest.raises(CheckpointError, match="100 mel frames does not fill the 2 segments of 60"):
        build().encode(torch.zeros(10, 100), 61)


def test_config_without_model_type_is_a_qwen2_audio_encoder_with_its_defaults() -> None:
    config = EncoderConfig.from_dict({"_attn_implementation_autoset": True, "dropout": 0.0})
    published = Qwen2AudioEncoderConfig()
    assert config.model_type == "qwen2_audio_encoder"
    for name in SIZES | {"activation_function": None}:
        assert getattr(config, name) == getattr(published, name)


def test_absent_keys_of_a_whisper_config_mean_the_defaults_of_its_own_class() -> None:
    config, published = EncoderConfig.from_dict({"model_type": "whisper"}), WhisperConfig()
    assert {n: getattr(config, n) for n in SIZES} == {n: getattr(published, n) for n in SIZES}


def test_a_whole_qwen2_audio_config_is_asked_for_its_audio_config() -> None:
    nested = EncoderConfig.from_dict({"model_type": "qwen2_audio", "audio_config": SIZES})
    assert nested == EncoderConfig.from_dict(SIZES | {"model_type": "qwen2_audio"})
    assert ENCODERS["qwen2_audio"].pools


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"model_type": "hubert"}, "unknown audio encoder 'hubert'; known: qwen2_audio_encoder, "),
        ({"activation_function": "mish"}, "unknown activation_function 'mish'"),
        ({"d_model": 10, "encoder_attention_heads": 3}, "d_model=10 .* is not a multiple of"),
    ],
)
def test_an_encoder_that_cannot_be_built_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        EncoderConfig.from_dict(raw)


def test_encoder_is_built_on_meta_without_memory() -> None:
    encoder = build_on_meta(lambda: build("whisper"))
    assert all(t.is_meta for t in encoder.state_dict().values()) and not list(encoder.buffers())
