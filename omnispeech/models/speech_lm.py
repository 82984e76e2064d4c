"""The speech LM: a small decoder that reads projected LLM states and writes speech units."""

import torch
from torch import Tensor, nn

from omnispeech.models.qwen3 import CausalLM, Qwen3Config

SPEAKER_WIDTH = 512


class SpeechLM(CausalLM):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.spk2tts = nn.Linear(SPEAKER_WIDTH, config.hidden_size, bias=False)
        self.spk_ln = nn.LayerNorm(config.hidden_size)

    def speaker(self, embedding: Tensor | None = None) -> Tensor:
        """[512] -> [D]: the first vector the speech LM reads. The original always passes zeros."""
        if embedding is None:
            embedding = torch.zeros_like(self.spk2tts.weight[0])
        return self.spk_ln(self.spk2tts(embedding))
