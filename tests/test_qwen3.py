"""The decoders against transformers, and rows against themselves alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from omnispeech.errors import CheckpointError
from omnispeech.layers.kv_cache import KVCache
from omnispeech.layers.rotary import RopeScaling
from omnispeech.models.qwen3 import CausalLM, Qwen3Config, with_defaults

DIMENSIONS: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
}


# with theta 100 and 12 wide heads: two frequencies are kept, two blended, two divided
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def oracle(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {**DIMENSIONS, "initializer_range": 0.3, **changes}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    for name, parameter in theirs.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return theirs.eval()


def ours(theirs: Any) -> CausalLM:
    model = CausalLM(Qwen3Config.from_dict(theirs.config.to_dict()))
    model.load_state_dict(theirs.state_dict())
    return model.eval()


def run(model: CausalLM, ids: Tensor, cuts: list[int]) -> Tensor:
    cache = model.new_cache(len(ids))
    row = cache.allocate(len(ids))
    assert row is not None
    states = []
    for part in ids.split(cuts):
        layout = cache.layout([(row, len(part))])
        states.append(model(model.embed(part), cache, layout))
        layout.commit()
    return torch.cat(states)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3", {"head_dim": 16, "rope_theta": 1e6}),
        ("qwen3", {"head_dim": 32, "attention_bias": True}),
        ("qwen2", {}),
        ("qwen2", {"rope_theta": 1e6}),
        ("llama", {"rms_norm_eps": 1e-5}),
        ("llama", {"head_dim": 16, "attention_bias": True}),
        ("llama", {"rope_theta": 100.0, "rope_scaling": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_theta": 100.0, **LLAMA3}}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": None, "head_dim": 32}),
    ],
)
@torch.inference_mode()
def test_hidden_states_and_logits_are_those_of_transformers(
    kind: str, changes: dict[str, Any]
) -> None:
    theirs = oracle(kind, **changes)
    ids = torch.arange(40) * 7 % 101
    expected = theirs(ids[None], output_hidden_states=True)
    model = ours(theirs)
    hidden = run(model, ids, [40])
    torch.testing.assert_close(hidden, expected.hidden_states[-1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.lm_head(hidden), expected.logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cuts", [[1] * 24, [24], [5, 1, 11, 7], [23, 1]])
@torch.inference_mode()
def test_prefill_in_any_pieces_equals_one_call(cuts: list[int]) -> None:
    model = ours(oracle("qwen3", head_dim=16))
    ids = torch.arange(24) * 5 % 101
    torch.testing.assert_close(run(model, ids, cuts), run(model, ids, [24]), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_rows_in_one_call_do_not_see_each_other() -> None:
    model = ours(oracle("qwen3", head_dim=16))
    first, second = torch.arange(9), torch.arange(50, 63)
    cache = model.new_cache(64)
    rows = [cache.allocate(20), cache.allocate(20)]
    assert rows[0] is not None and rows[1] is not None
    layout = cache.layout([(rows[0], 9), (rows[1], 13)])
    together = model(model.embed(torch.cat([first, second])), cache, layout)
    alone = torch.cat([run(model, first, [9]), run(model, second, [13])])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_absent_keys_mean_the_class_defaults() -> None:
    config = Qwen3Config.from_dict({"model_type": "qwen3", "num_attention_heads": 16})
    assert (config.hidden_size, config.num_key_value_heads, config.head_dim) == (4096, 32, 128)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 10000.0)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "mistral"])
def test_absent_keys_mean_the_class_defaults_of_every_type(kind: str) -> None:
    from transformers import AutoConfig

    given = {"model_type": kind, "sliding_window": None}
    theirs = AutoConfig.for_model(**given).to_dict()
    assert Qwen3Config.from_dict(given) == Qwen3Config.from_dict(theirs)
    context = with_defaults(given)[1]["max_position_embeddings"]
    assert context == theirs["max_position_embeddings"]


@pytest.mark.parametrize(
    ("heads", "groups", "width"), [(8, None, 4096 // 8), (32, 4, 128)], ids=["absent", "given"]
)
def test_heads_of_llama_follow_from_its_width(heads: int, groups: int | None, width: int) -> None:
    raw = {"model_type": "llama", "num_attention_heads": heads}
    config = Qwen3Config.from_dict(raw | ({"num_key_value_heads": groups} if groups else {}))
    assert (config.num_key_value_heads, config.head_dim) == (groups or heads, width)


def test_rope_theta_is_read_from_both_places() -> None:
    new = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    assert Qwen3Config.from_dict(new).rope_theta == 1e6
    assert Qwen3Config.from_dict({"rope_theta": 5e5}).rope_theta == 5e5


def test_scaled_rotation_is_read_from_both_places_and_spellings() -> None:
    expected = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64
    )
    old = {"type": "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_type"}}
    for rope in (
        {"rope_scaling": LLAMA3},
        {"rope_scaling": old},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    ):
        assert Qwen3Config.from_dict({"model_type": "llama", **rope}).rope_scaling == expected


@pytest.mark.parametrize("wrong", [{"factor": None}, {"factor": 0}, {"high_freq_factor": 1.0}])
def test_a_scaling_that_means_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"it needs factor, low_freq_factor"):
        Qwen3Config.from_dict({"model_type": "llama", "rope_scaling": {**LLAMA3, **wrong}})


@pytest.mark.parametrize(
    "raw",
    [
        {"model_type": "gpt2"},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"use_sliding_window": True},
        {"model_type": "llama", "mlp_bias": True},
        {"model_type": "mistral"},
        {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768},
    ],
)
def test_what_is_not_implemented_is_refused_by_name(raw: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"supported|known"):
        Qwen3Config.from_dict(raw)


def test_a_window_as_wide_as_the_context_is_no_window() -> None:
    raw = {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 4096}
    assert Qwen3Config.from_dict(raw).num_key_value_heads == 8


def small_cache(tokens: int) -> KVCache:
    return KVCache(1, tokens, 1, 4, dtype=torch.float32, device=torch.device("cpu"))


def test_released_positions_are_joined_and_used_again() -> None:
    cache = small_cache(30)
    rows = [cache.allocate(10) for _ in range(3)]
    assert cache.allocate(1) is None
    for row in (rows[0], rows[2], rows[1]):
        assert row is not None
        cache.release(row)
    assert cache.free_tokens == 30
    assert cache.allocate(30) is not None


def test_a_conversation_takes_only_the_positions_it_asked_for() -> None:
    cache = small_cache(1000)
    cache.allocate(7)
    assert cache.free_tokens == 993
