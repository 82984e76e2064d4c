import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model, WavLMModel
from transformers import WavLMConfig as TransformersConfig

from omnispeech.checkpoint.wavlm import plain_weights
from omnispeech.errors import CheckpointError
from omnispeech.models.wavlm import PIECE, Bridge, WavLMConfig, WavLMEncoder, bridged

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_buckets": 32,
    "max_bucket_distance": 80,
}
POSITION_BIAS = ("rel_attn_embed", "gru_rel_pos_linear", "gru_rel_pos_const")


@torch.no_grad()
def oracle(**changes: Any) -> WavLMModel:
    """transformers' own, with a position bias and gates that matter."""
    torch.manual_seed(0)
    model = WavLMModel(TransformersConfig(**SIZES | changes)).eval()
    for name, parameter in model.named_parameters():
        if any(part in name for part in POSITION_BIAS):
            parameter.normal_()
        elif ".attention." in name:
            parameter.normal_(std=0.2)
    return model


def build(model: WavLMModel | None = None, d_model: int = 24, **changes: Any) -> WavLMEncoder:
    do_normalize = changes.pop("do_normalize", False)
    torch.manual_seed(1)
    body = SIZES | changes
    encoder = WavLMEncoder(WavLMConfig(d_model=d_model, do_normalize=do_normalize, body=body))
    weights = plain_weights((model or oracle(**changes)).state_dict(), "a test")
    encoder.wavlm.load_state_dict(weights)
    return encoder.eval().requires_grad_(False)


def sound(samples: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
        {"hidden_act": "relu", "num_hidden_layers": 1, "num_conv_pos_embeddings": 9},
    ],
    ids=str,
)
def test_features_equal_those_of_transformers_to_the_bit(changes: dict[str, Any]) -> None:
    model, samples = oracle(**changes), sound(9600)
    with torch.no_grad():
        expected = model(samples[None]).last_hidden_state[0]
    assert torch.equal(build(model, **changes).features(samples), expected)


def test_f5_it_is_a_wavlm_and_no_wav2vec2() -> None:
    """Defect F5: the fork's class drops the position bias in silence."""
    model, samples = oracle(), sound(16000)
    wav2vec2 = Wav2Vec2Model(Wav2Vec2Config(**{k: SIZES[k] for k in list(SIZES)[:7]})).eval()
    with torch.no_grad():
        dropped = wav2vec2.load_state_dict(model.state_dict(), strict=False).unexpected_keys
        other = wav2vec2(samples[None]).last_hidden_state[0]
    assert dropped and all(any(part in name for part in POSITION_BIAS) for name in dropped)
    heard = build(model).features(samples)
    assert heard.shape == other.shape and (heard - other).abs().max() > 0.1


LENGTHS = [320, 399, 400, 719, 720, 1039, 1040, 8000, 16000, 16001, 48_123, 160_000]


@pytest.mark.parametrize("samples", LENGTHS)
def test_f5_lengths_by_formula_are_those_that_come_out(samples: int) -> None:
    """Defect F5: the fork claims 125 frames for the 25 of a second."""
    encoder = build()
    frames = encoder.encode(sound(samples), samples)
    assert frames.shape == (encoder.output_length(samples), 24)
    assert len(frames) == {320: 0, 399: 0, 400: 1, 16000: 25, 160_000: 250}.get(
        samples, len(frames)
    )


@pytest.mark.parametrize(
    "samples", [PIECE - 1, PIECE, PIECE + 1, PIECE + 399, PIECE + 400, 2 * PIECE + 80_000]
)
def test_f5_lengths_of_more_than_30_s_are_those_that_come_out(samples: int) -> None:
    encoder = build(num_hidden_layers=1, hidden_size=16, num_attention_heads=1)
    assert len(encoder.encode(sound(samples), samples)) == encoder.output_length(samples)


def test_a_full_piece_has_as_many_frames_as_a_segment_of_the_published_encoder() -> None:
    encoder = build()
    assert encoder.output_length(PIECE) == 750
    assert encoder.output_length(65 * 16000) == 2 * 750 + encoder.output_length(5 * 16000) == 1625


def test_long_audio_is_heard_in_pieces_of_30_s() -> None:
    encoder = build(num_hidden_layers=1, hidden_size=16, num_attention_heads=1)
    clip = sound(PIECE + 24_000)
    pieces = [clip[:PIECE], clip[PIECE:]]
    apart = torch.cat([encoder.encode(piece, len(piece)) for piece in pieces])
    assert torch.equal(encoder.encode(clip, len(clip)), apart)


@pytest.mark.parametrize("do_normalize", [False, True])
def test_f5_what_stands_behind_the_sound_is_not_heard(do_normalize: bool) -> None:
    """Defect F5: the fork never masks its padding."""
    encoder, clip = build(do_normalize=do_normalize), sound(12_345)
    padded = torch.cat([clip, sound(7000, seed=1)])
    assert torch.equal(encoder.encode(padded, len(clip)), encoder.encode(clip, len(clip)))


@pytest.mark.parametrize("samples", [0, 1, 10, 399])
def test_a_sound_shorter_than_one_window_gives_nothing(samples: int) -> None:
    encoder = build()
    assert encoder.encode(sound(samples), samples).shape == (0, 24)
    assert encoder.output_length(samples) == 0


def test_the_samples_are_normalized_as_by_the_feature_extractor_if_it_does() -> None:
    clip = 0.01 * sound(20_000).numpy() + np.float32(0.2)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    wanted = torch.from_numpy(extractor(clip, sampling_rate=16_000)["input_values"][0])
    torch.testing.assert_close(build(do_normalize=True).pieces(torch.from_numpy(clip))[0], wanted)
    assert torch.equal(build().pieces(torch.from_numpy(clip))[0], torch.from_numpy(clip))


def test_the_whole_clip_is_normalized_before_it_is_cut() -> None:
    clip = torch.cat([sound(PIECE), 0.01 * sound(8000)])
    loud, quiet = build(do_normalize=True).pieces(clip)
    assert 0.99 < loud.std() < 1.02 and quiet.std() < 0.02


def test_it_runs_in_bfloat16() -> None:
    encoder, clip = build(), sound(16_000)
    exact = encoder.encode(clip, len(clip))
    rounded = encoder.to(torch.bfloat16).encode(clip, len(clip))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_the_bridge_halves_the_rate() -> None:
    bridge = Bridge(6, 10)
    for count in (1, 2, 3, 49, 50):
        assert bridge(torch.randn(count, 6)).shape == (bridged(count), 10)


def test_names_are_those_of_the_checkpoint() -> None:
    names = set(build().state_dict())
    assert {n for n in names if not n.startswith("wavlm.")} == {
        "temporal_adapter.weight",
        "temporal_adapter.bias",
        "dimension_projection.weight",
        "dimension_projection.bias",
    }
    assert "wavlm.encoder.layers.0.attention.rel_attn_embed.weight" in names


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"conv_kernel": [10, 3]}, r"conv_kernel=\[10, 3\] and conv_stride=.* equally many"),
        ({"conv_stride": [5, 2, 2, 2, 2, 2, 0]}, "each 1 or more"),
        ({"add_adapter": True}, "add_adapter of WavLM is on"),
        ({"conv_dim": [16]}, "no WavLM can be built"),
        ({"hidden_act": "loud"}, "no WavLM can be built"),
        ({"num_attention_heads": 5}, "no WavLM can be built"),
        ({"num_attention_heads": 0}, "no WavLM can be built"),
        ({"torch_dtype": "float99"}, "no WavLM can be built"),
        ({"conv_kernel": 10}, "the config of WavLM cannot be read"),
        ({"conv_stride": ["5"] * 7}, "the config of WavLM cannot be read"),
        ({"hidden_size": None}, "the config of WavLM cannot be read"),
    ],
)
def test_an_impossible_config_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        WavLMEncoder(WavLMConfig(body=SIZES | changes))


def test_what_a_config_says_of_outputs_changes_nothing() -> None:
    encoder = WavLMEncoder(WavLMConfig(body=SIZES | {"return_dict": False})).eval()
    with torch.inference_mode():
        assert len(encoder.features(torch.zeros(1600))) == encoder.features_of(1600)


def test_a_config_of_another_encoder_under_the_name_of_wavlm_says_nothing_of_it() -> None:
    """As the fork writes it: every checkpoint becomes wavlm."""
    raw = {"model_type": "wavlm", "d_model": 1280, "encoder_layers": 32, "num_hidden_layers": 32}
    assert WavLMConfig.from_dict(raw) == WavLMConfig(d_model=1280)


def test_transformers_is_imported_when_a_wavlm_is_built_and_not_before() -> None:
    code = "import omnispeech.models.omnispeech, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
