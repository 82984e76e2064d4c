"""Qwen3 and Qwen2 decoders: vectors in, hidden states after the final norm out (spec: opens2s 10).

Both language models of OpenS2S are of this kind. Input is embeddings, because the LLM reads
spliced sound and the speech LM reads projected states of the LLM.
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
from omnispeech.layers.rotary import rotary_table, rotate

# Qwen3Config and Qwen2Config of transformers 4.51: a nested config is stored as its difference
CLASS_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
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
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    head_norms: bool  # per-head RMSNorm of queries and keys: qwen3, not qwen2

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Qwen3Config":
        """A nested config of the checkpoint; absent keys mean the defaults of transformers 4.51."""
        kind = raw.get("model_type", "qwen3")
        if kind not in ("qwen3", "qwen2"):
            raise CheckpointError(f"language model type {kind!r} is unknown; known: qwen3, qwen2")
        _refuse_unsupported(raw)
        value = {**CLASS_DEFAULTS, **raw}
        hidden, heads = value["hidden_size"], value["num_attention_heads"]
        return cls(
            hidden_size=hidden,
            intermediate_size=value["intermediate_size"],
            num_hidden_layers=value["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=value["num_key_value_heads"] or heads,
            head_dim=value.get("head_dim") or (128 if kind == "qwen3" else hidden // heads),
            vocab_size=value["vocab_size"],
            rms_norm_eps=value["rms_norm_eps"],
            rope_theta=_rope_theta(raw),
            tie_word_embeddings=value["tie_word_embeddings"],
            qkv_bias=value["attention_bias"] or kind == "qwen2",
            output_bias=value["attention_bias"] and kind == "qwen3",
            head_norms=kind == "qwen3",
        )


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """transformers 5 writes rope_parameters.rope_theta, older versions rope_theta."""
    parameters = raw.get("rope_parameters") or {}
    return float(
        parameters.get("rope_theta") or raw.get("rope_theta") or CLASS_DEFAULTS["rope_theta"]
    )


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    for name, value, allowed in (
        ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
        ("rope type", rope_type, "default"),
        ("use_sliding_window", bool(raw.get("use_sliding_window", False)), False),
    ):
        if value != allowed:
            raise CheckpointError(f"the language model has {name}={value!r}; supported: {allowed}")


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
        rotary = rotary_table(layout.positions, self.config.head_dim, self.config.rope_theta)
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
