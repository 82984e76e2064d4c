"""Decoders of the model types qwen3, qwen2, llama and mistral: vectors in, hidden states after the
final norm out (spec: opens2s 10).

Both language models of OpenS2S are qwen3; the other three differ from it by head norms and biases.
Input is embeddings, because the LLM reads spliced sound and the speech LM reads projected states
of the LLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from omnispeech.errors import CheckpointError
from omnispeech.layers.attention import attend
from omnispeech.layers.kv_cache import KVCache, Layout
from omnispeech.layers.norms import RMSNorm
from omnispeech.layers.rotary import RopeScaling, rotary_table, rotate

# Config classes of transformers 4.51 and 5: a nested config is stored as its difference to them
COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
QWEN_DEFAULTS = COMMON_DEFAULTS | {
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
}
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
    "qwen2": QWEN_DEFAULTS,
    "llama": COMMON_DEFAULTS
    | {
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": COMMON_DEFAULTS
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Config:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int  # of prompt and reply together
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    head_norms: bool  # per-head RMSNorm of queries and keys: qwen3 alone

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Qwen3Config":
        """A config.json, or a nested one; absent keys mean the class defaults of transformers."""
        kind, value = with_defaults(raw)
        _refuse_unsupported(value)
        hidden, heads = value["hidden_size"], value["num_attention_heads"]
        bias = kind in ("qwen3", "llama") and value["attention_bias"]
        return cls(
            hidden_size=hidden,
            intermediate_size=value["intermediate_size"],
            num_hidden_layers=value["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=value["num_key_value_heads"] or heads,
            head_dim=value.get("head_dim") or (128 if kind == "qwen3" else hidden // heads),
            vocab_size=value["vocab_size"],
            max_position_embeddings=value["max_position_embeddings"],
            rms_norm_eps=value["rms_norm_eps"],
            rope_theta=_rope_theta(raw),
            rope_scaling=_rope_scaling(raw),
            tie_word_embeddings=value["tie_word_embeddings"],
            qkv_bias=bias or kind == "qwen2",
            output_bias=bias,
            head_norms=kind == "qwen3",
        )

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [T] -> cos, sin: [T, 1, head_dim] float32"""
        return rotary_table(positions, self.head_dim, self.rope_theta, self.rope_scaling)


def with_defaults(raw: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model type of a config, and all its values; raises CheckpointError for other types."""
    kind = raw.get("model_type", "qwen3")
    if kind not in CLASS_DEFAULTS:
        known = ", ".join(CLASS_DEFAULTS)
        raise CheckpointError(f"language model type {kind!r} is unknown; known: {known}")
    return kind, {**CLASS_DEFAULTS[kind], **raw, "model_type": kind}


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 writes all about it into rope_parameters, older versions into two places."""
    return raw.get("rope_scaling") or raw.get("rope_parameters") or {}


def _rope_theta(raw: Mapping[str, Any]) -> float:
    places = (_rope(raw), raw.get("rope_parameters") or {}, raw, COMMON_DEFAULTS)
    return float(next(place["rope_theta"] for place in places if place.get("rope_theta")))


def _rope_type(raw: Mapping[str, Any]) -> str:
    return _rope(raw).get("rope_type", _rope(raw).get("type", "default"))


def _rope_scaling(raw: Mapping[str, Any]) -> RopeScaling | None:
    if _rope_type(raw) == "default":
        return None
    rope = _rope(raw)
    try:
        return RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_context=int(rope["original_max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(
            f"rope type 'llama3' with {dict(rope)!r}; it needs factor, low_freq_factor, "
            "high_freq_factor and original_max_position_embeddings, each a number, "
            "the high one above the low one"
        ) from exc


def _partial(raw: Mapping[str, Any]) -> float:
    return _rope(raw).get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0


def _refuse_unsupported(value: Mapping[str, Any]) -> None:
    for name, found, allowed in (
        ("hidden_act", value["hidden_act"], ["silu"]),
        ("rope type", _rope_type(value), ["default", "llama3"]),
        ("partial_rotary_factor", _partial(value), [1.0]),
        ("use_sliding_window", bool(value.get("use_sliding_window")), [False]),
        ("mlp_bias", bool(value.get("mlp_bias")), [False]),
    ):
        if found not in allowed:
            known = ", ".join(str(choice) for choice in allowed)
            raise CheckpointError(f"the language model has {name}={found!r}; supported: {known}")
    window, context = value.get("sliding_window"), value["max_position_embeddings"]
    if value["model_type"] == "mistral" and window is not None and window < context:
        raise CheckpointError(
            f"the language model attends to the last sliding_window={window} of "
            f"max_position_embeddings={context} positions, supported: all of them; lower "
            f"max_position_embeddings to {window} in config.json, up to where both are the same"
        )


class Attention(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        c = config
        queries = c.num_attention_heads * c.head_dim
        keys = c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, queries, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.o_proj = nn.Linear(queries, c.hidden_size, bias=c.output_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.head_norms else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.head_norms else nn.Identity()
        self.head_dim = c.head_dim

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache, layer: int, layout: Layout
    ) -> Tensor:
        """[T, D] -> [T, D]"""
        split = (x.shape[0], -1, self.head_dim)
        queries = rotate(self.q_norm(self.q_proj(x).view(split)), *rotary)  # [T, H, head_dim]
        keys = rotate(self.k_norm(self.k_proj(x).view(split)), *rotary)  # [T, G, head_dim]
        cache.write(layer, layout, keys, self.v_proj(x).view(split))
        return self.o_proj(attend(queries, cache, layer, layout).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache, layer: int, layout: Layout
    ) -> Tensor:
        """[T, D] -> [T, D]"""
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, layer, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.config = config

    def forward(self, x: Tensor, cache: KVCache, layout: Layout) -> Tensor:
        """[T, D] -> [T, D]"""
        rotary = self.config.rotary(layout.positions)
        for i, block in enumerate(self.layers):
            x = block(x, rotary, cache, i, layout)
        return self.norm(x)


class CausalLM(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.model = Decoder(config)
        # never tied here: the stored head counts, whatever the flag says (spec: opens2s 3.6)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.config = config

    def embed(self, ids: Tensor) -> Tensor:
        """[T] -> [T, D]"""
        return self.model.embed_tokens(ids)

    def forward(self, x: Tensor, cache: KVCache, layout: Layout) -> Tensor:
        """Vectors of several rows laid end to end: [T, D] -> [T, D] after the final norm."""
        return self.model(x, cache, layout)

    def new_cache(self, tokens: int) -> KVCache:
        """Room for `tokens` positions of all conversations together."""
        weight = self.model.embed_tokens.weight
        return KVCache(
            self.config.num_hidden_layers,
            tokens,
            self.config.num_key_value_heads,
            self.config.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )
