"""How much memory a start takes: weights and caches by computation, the rest estimated."""

from dataclasses import dataclass

import torch

from omnispeech.checkpoint.models_directory import Sources
from omnispeech.checkpoint.sizes import (
    cache_sizes,
    decoder_size,
    read_model_config,
    weight_sizes,
)
from omnispeech.checkpoint.weight_plan import Target
from omnispeech.config import EngineConfig
from omnispeech.models.qwen3 import Qwen3Config

# Beyond weights and caches: libraries, measured with the smallest checkpoint; on a GPU the context
# of CUDA, which depends on GPU and driver.
PROCESS = {"cpu": 400 << 20, "cuda": 600 << 20}
PROMPT = 2048  # positions read at once when nobody talks
ENCODED = 1500  # frames of 30 s of sound
SOUND = 400 << 20  # while a block of sound is made: 260 units through flow and vocoder


@dataclass(frozen=True, slots=True)
class Need:
    known: dict[str, int]  # bytes of each part
    estimated: int  # bytes: activations, libraries

    @property
    def total(self) -> int:
        return sum(self.known.values()) + self.estimated


def memory_need(sources: Sources, target: Target, engine: EngineConfig) -> Need:
    """On the device of `target`. Raises CheckpointError for what could not be loaded."""
    known = {
        **weight_sizes(sources, target),
        "speech decoder": decoder_size(sources.decoder),
        **cache_sizes(sources.base, engine.kv_tokens, target.dtype),
    }
    return Need(known, _working_memory(sources, target, engine))


def _working_memory(sources: Sources, target: Target, engine: EngineConfig) -> int:
    config = read_model_config(sources.base)
    encoder = config.audio_encoder
    heard = ENCODED * 12 * encoder.d_model * target.dtype.itemsize
    read = _prompt_memory(config.llm, target.dtype)
    chosen = engine.max_conversations * config.llm.vocab_size * 16  # logits, sorted, in float32
    return PROCESS[target.device.type] + max(heard, read) + chosen + SOUND


def _prompt_memory(lm: Qwen3Config, dtype: torch.dtype) -> int:
    """Bytes while a long piece of a prompt goes through one layer, its weights dequantized."""
    widths = 8 * lm.hidden_size + 3 * lm.intermediate_size
    return PROMPT * widths * dtype.itemsize + 2 * lm.hidden_size * lm.intermediate_size
