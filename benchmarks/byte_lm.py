"""A language model of bytes: what it is, what it computes, and its directory on disk."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.corpus import VOCABULARY
from omnispeech.layers.norms import RMSNorm
from omnispeech.models.qwen3 import Block, Qwen3Config
from omnispeech.quantization.stream import Stream

CPU = torch.device("cpu")
BATCH_TOKENS = 2048  # of one call


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is trained, and how; the defaults are M1: 3.1 M parameters."""

    hidden: int = 256
    inner: int = 768
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_width: int = 32
    steps: int = 800
    rate: float = 2e-3
    seed: int = 0

    def config(self) -> dict[str, Any]:
        """config.json, for every version of transformers."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "head_dim": self.head_width,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "max_position_embeddings": 4096,
            "model_type": "qwen3",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": VOCABULARY,
        }


@dataclass(frozen=True, slots=True, eq=False)
class ByteLM:
    raw: Mapping[str, Any]  # config.json
    weights: Mapping[str, Tensor]  # float32, named as Hugging Face names them

    @property
    def config(self) -> Qwen3Config:
        return Qwen3Config.from_dict(self.raw)

    def embed(self, ids: Tensor) -> Tensor:
        """[...] -> [..., D]"""
        return self.weights["model.embed_tokens.weight"][ids]

    def blocks(self) -> list[Block]:
        """New ones, which may be changed."""
        return [self._block(i) for i in range(self.config.num_hidden_layers)]

    def _block(self, index: int) -> Block:
        prefix = f"model.layers.{index}."
        own = {n.removeprefix(prefix): w for n, w in self.weights.items() if n.startswith(prefix)}
        block = Block(self.config).eval().requires_grad_(False)
        block.load_state_dict(own)
        return block

    def stream(self, vectors: Tensor, counted: Tensor | None = None) -> Stream:
        """Sequences [B, T, D] in front of the first layer."""
        everything = torch.ones(vectors.shape[:2], dtype=torch.bool)
        mask = everything if counted is None else counted
        return Stream(self.config, list(vectors), list(mask), device=CPU, batch_tokens=BATCH_TOKENS)

    def logits(self, blocks: list[Block], vectors: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, V]"""
        stream = self.stream(vectors)
        for block in blocks:
            stream.advance(block)
        norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.load_state_dict({"weight": self.weights["model.norm.weight"]})
        states = norm(torch.stack(stream.states)).detach()
        return F.linear(states, self.weights["lm_head.weight"])


def write_model(model: ByteLM, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """A Hugging Face model directory with a tokenizer of bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = {**model.raw, "torch_dtype": str(dtype).removeprefix("torch.")}
    for name, content in (
        ("config.json", raw),
        ("generation_config.json", {"bos_token_id": 0, "eos_token_id": 0}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        (directory / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _byte_tokenizer().save(str(directory / "tokenizer.json"))
    weights = {name: weight.to(dtype).contiguous() for name, weight in model.weights.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def read_model(directory: Path) -> ByteLM:
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    stored = load_file(directory / "model.safetensors")
    return ByteLM(raw, {name: weight.float() for name, weight in stored.items()})


def _byte_tokenizer() -> Any:
    """Token i is byte i, shown as byte-level tokenizers show it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    plain = [b for b in range(256) if chr(b).isprintable() and b not in (0x20, 0xA0, 0xAD)]
    shown = {b: chr(b) for b in plain}
    shown |= {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(plain)))}
    vocabulary = {character: byte for byte, character in shown.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
