from typing import Any

import pytest
import torch
from torch import Tensor

from omnispeech.checkpoint.files import build_on_meta
from omnispeech.errors import CheckpointError, RequestError
from omnispeech.models.omnispeech import OmniSpeech, OmniSpeechConfig

LM: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 50,
}
ENCODER: dict[str, Any] = {
    "d_model": 12,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 10,
    "max_source_positions": 40,
}
RAW: dict[str, Any] = {
    "audio_encoder_config": ENCODER,
    "llm_config": LM,
    "tts_lm_config": LM | {"hidden_size": 8},
}

QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151673,
}
QWEN3_1_7B = QWEN3_8B | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "vocab_size": 168053,
}


@pytest.fixture(scope="module")
def model() -> OmniSpeech:
    torch.manual_seed(0)
    return OmniSpeech(OmniSpeechConfig.from_dict(RAW)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def published() -> OmniSpeech:
    raw = {
        "audio_encoder_config": {"model_type": "qwen2_audio_encoder"},
        "llm_config": QWEN3_8B,
        "tts_lm_config": QWEN3_1_7B,
        "interleave_strategy": "4:8",
    }
    return build_on_meta(lambda: OmniSpeech(OmniSpeechConfig.from_dict(raw)))


def mel(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(10, frames, generator=torch.Generator().manual_seed(seed))


def test_an_audio_beside_a_longer_one_differs_in_its_last_vector_under_the_batch_rule(
    model: OmniSpeech,
) -> None:
    mels, valid = [mel(80), mel(160, 1)], [44, 150]
    alone = model.embed_audio(mels[:1], valid[:1], batch_rule=True)[0]
    together = model.embed_audio(mels, valid, batch_rule=True)[0]
    torch.testing.assert_close(together[:-1], alone[:-1], rtol=0, atol=1e-5)
    assert (together[-1] - alone[-1]).abs().max() > 1e-3


def test_without_the_batch_rule_every_audio_is_embedded_as_if_alone(model: OmniSpeech) -> None:
    mels, valid = [mel(80), mel(160, 1), mel(80, 2)], [44, 150, 7]
    together = model.embed_audio(mels, valid, batch_rule=False)
    for i, vectors in enumerate(together):
        alone = model.embed_audio([mels[i]], [valid[i]], batch_rule=True)[0]
        torch.testing.assert_close(vectors, alone, rtol=0, atol=1e-6)


def test_the_longest_audio_is_the_same_under_both_rules(model: OmniSpeech) -> None:
    mels, valid = [mel(80), mel(160, 1)], [44, 150]
    both = [model.embed_audio(mels, valid, batch_rule=rule)[1] for rule in (True, False)]
    torch.testing.assert_close(*both, rtol=0, atol=0)


@pytest.mark.parametrize("batch_rule", [True, False])
def test_only_the_batch_rule_hears_the_encoded_silence_behind_an_audio(
    model: OmniSpeech, batch_rule: bool
) -> None:
    frames, longer = torch.randn(20, 12), torch.randn(40, 12)
    blanked = torch.cat([frames[:11], torch.zeros(9, 12)])
    heard, unheard = (
        model.adapt_audio([x, longer], [11, 40], batch_rule=batch_rule)[0]
        for x in (frames, blanked)
    )
    assert torch.equal(heard[:-1], unheard[:-1])
    assert torch.equal(heard[-1], unheard[-1]) is not batch_rule


def test_behind_its_last_segment_an_audio_is_followed_by_zeros(model: OmniSpeech) -> None:
    frames = torch.randn(20, 12)  # one full segment
    joined = model.adapt_audio([frames, torch.randn(40, 12)], [20, 40], batch_rule=True)[0]
    padded = torch.nn.functional.pad(frames, (0, 0, 0, 20))
    expected = model.audio_adapter(padded[None])[0, :5]
    torch.testing.assert_close(joined, expected, rtol=0, atol=1e-6)


def test_an_audio_of_one_frame_has_no_vector(model: OmniSpeech) -> None:
    assert [len(v) for v in model.embed_audio([mel(80)], [1], batch_rule=True)] == [0]
    assert model.embed_audio([], [], batch_rule=True) == []


def test_splice_puts_each_audio_in_its_slot_in_order(model: OmniSpeech) -> None:
    audios = [torch.randn(3, 16), torch.randn(2, 16)]
    spliced = model.splice([-200, 4, 9, -1, 7], audios)
    words = model.llm_model.model.embed_tokens.weight
    expected = torch.cat([audios[0], words[[4, 9]], audios[1], words[[7]]])
    assert torch.equal(spliced, expected)


def test_splice_without_audio_is_the_embedding(model: OmniSpeech) -> None:
    assert torch.equal(model.splice([3, 1], []), model.llm_model.model.embed_tokens.weight[[3, 1]])


@pytest.mark.parametrize("ids, audios", [([1, 2], 1), ([1, -200], 0), ([-200] * 2, 1)])
def test_splice_refuses_unequal_numbers_of_slots_and_audios(
    model: OmniSpeech, ids: list[int], audios: int
) -> None:
    with pytest.raises(RequestError, match=f"audio slots and the request {audios} audios"):
        model.splice(ids, [torch.zeros(1, 16)] * audios)


def test_speech_condition_is_the_normed_projection(model: OmniSpeech) -> None:
    states = torch.randn(3, 16)
    projected = states @ model.llm2tts.weight.T
    expected = torch.nn.functional.layer_norm(projected, (8,), eps=1e-5)
    torch.testing.assert_close(model.speech_condition(states), expected)


def test_config_keys_that_are_absent_mean_the_defaults_of_the_format() -> None:
    config = OmniSpeechConfig.from_dict(RAW)
    assert (config.text_span, config.unit_span) == (1, 2)
    assert (config.conv_kernel_sizes, config.adapter_inner_dim) == ((5, 5), 512)
    assert config.audio_encoder.model_type == "qwen2_audio_encoder"
    assert config.llm.head_norms and not config.llm.tie_word_embeddings


@pytest.mark.parametrize(
    "change, message",
    [
        ({"interleave_strategy": "4"}, "interleave_strategy='4' in config.json; allowed"),
        ({"interleave_strategy": "4:0"}, "interleave_strategy='4:0'"),
        ({"conv_kernel_sizes": "5;5"}, "conv_kernel_sizes='5;5'"),
        ({"conv_kernel_sizes": ""}, "conv_kernel_sizes=''"),
        ({"llm_config": None}, "config.json has no llm_config; it needs"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        OmniSpeechConfig.from_dict(RAW | change)


def test_published_sizes_give_the_published_parameter_counts(published: OmniSpeech) -> None:
    def count(*parts: torch.nn.Module) -> int:
        return sum(p.numel() for part in parts for p in part.parameters())

    assert count(published.llm_model) == 8_188_580_864
    assert count(published.audio_encoder_model) == 636_968_960
    assert count(published.audio_adapter) == 73_026_048
    assert count(published.llm2tts, published.llm_ln) == 8_392_704
    assert count(published.tts_lm_model) == 2_098_807_808


def test_published_sizes_give_the_published_names_and_shapes(published: OmniSpeech) -> None:
    shapes = {name: list(t.shape) for name, t in published.state_dict().items()}
    assert shapes == {
        **encoder_shapes(1280, 128, 1500, 5120, 32),
        **adapter_shapes(1280, 4096, 512, (5, 5)),
        **lm_shapes("llm_model.", QWEN3_8B),
        "llm2tts.weight": [2048, 4096],
        "llm_ln.weight": [2048],
        "llm_ln.bias": [2048],
        **lm_shapes("tts_lm_model.", QWEN3_1_7B),
        "tts_lm_model.spk2tts.weight": [2048, 512],
        "tts_lm_model.spk_ln.weight": [2048],
        "tts_lm_model.spk_ln.bias": [2048],
    }


def test_published_sizes_need_no_memory(published: OmniSpeech) -> None:
    assert all(t.is_meta for t in published.state_dict().values())
    assert not published.training and not list(published.buffers())


Shapes = dict[str, list[int]]


def encoder_shapes(width: int, bins: int, positions: int, inner: int, layers: int) -> Shapes:
    square, vector = [width, width], [width]
    layer = {
        **{f"self_attn.{p}_proj.weight": square for p in ("q", "k", "v", "out")},
        **{f"self_attn.{p}_proj.bias": vector for p in ("q", "v", "out")},
        **{f"self_attn_layer_norm.{p}": vector for p in ("weight", "bias")},
        **{f"final_layer_norm.{p}": vector for p in ("weight", "bias")},
        "fc1.weight": [inner, width],
        "fc1.bias": [inner],
        "fc2.weight": [width, inner],
        "fc2.bias": vector,
    }
    shapes = {
        "conv1.weight": [width, bins, 3],
        "conv1.bias": vector,
        "conv2.weight": [width, width, 3],
        "conv2.bias": vector,
        "embed_positions.weight": [positions, width],
        "layer_norm.weight": vector,
        "layer_norm.bias": vector,
        **{f"layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()},
    }
    return {f"audio_encoder_model.{name}": shape for name, shape in shapes.items()}


def adapter_shapes(width: int, out: int, inner: int, kernels: tuple[int, int]) -> Shapes:
    shapes = {
        "subsampler.conv_layers.0.weight": [2 * width, width, kernels[0]],
        "subsampler.conv_layers.0.bias": [2 * width],
        "subsampler.conv_layers.1.weight": [2 * out, width, kernels[1]],
        "subsampler.conv_layers.1.bias": [2 * out],
        "fc1.weight": [inner, out],
        "fc2.weight": [out, inner],
        "ln.weight": [out],
        "ln.bias": [out],
    }
    return {f"audio_adapter.{name}": shape for name, shape in shapes.items()}


def lm_shapes(prefix: str, raw: dict[str, Any]) -> Shapes:
    width, inner, head = raw["hidden_size"], raw["intermediate_size"], raw["head_dim"]
    queries, keys = raw["num_attention_heads"] * head, raw["num_key_value_heads"] * head
    layer = {
        "input_layernorm.weight": [width],
        "post_attention_layernorm.weight": [width],
        "self_attn.q_proj.weight": [queries, width],
        "self_attn.k_proj.weight": [keys, width],
        "self_attn.v_proj.weight": [keys, width],
        "self_attn.o_proj.weight": [width, queries],
        "self_attn.q_norm.weight": [head],
        "self_attn.k_norm.weight": [head],
        "mlp.gate_proj.weight": [inner, width],
        "mlp.up_proj.weight": [inner, width],
        "mlp.down_proj.weight": [width, inner],
    }
    layers = range(raw["num_hidden_layers"])
    return {
        f"{prefix}model.embed_tokens.weight": [raw["vocab_size"], width],
        f"{prefix}model.norm.weight": [width],
        f"{prefix}lm_head.weight": [raw["vocab_size"], width],
        **{f"{prefix}model.layers.{i}.{n}": shape for i in layers for n, shape in layer.items()},
    }
