"""Stands in for a GPU: models on the meta device, which refuses operands from the CPU."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import Caller, golden_models, question
from quantized_models import quantize_opens2s
from torch import Tensor, nn

from omnispeech.checkpoint.opens2s import load_opens2s
from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.runner import Models
from omnispeech.models.speech_decoder import SpeechDecoder

OPENS2S = Path(__file__).parent / "golden" / "opens2s" / "opens2s-tiny"
META = torch.device("meta")


def elsewhere(module: nn.Module, dtype: torch.dtype) -> Any:
    return copy.deepcopy(module).to(META).to(dtype)


def eight_bit(directory: Path) -> nn.Module:
    """The golden model with quantized linears; the reference is what runs on any device."""
    quantize_opens2s(OPENS2S, directory)
    return load_opens2s(directory, torch.device("cpu"), torch.bfloat16, kernel="reference").model


@pytest.fixture(params=["plain", "quantized"])
def engine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Conversations:
    """The language models in bf16, the decoder in fp32, as on a GPU."""
    models = golden_models()
    decoder = models.decoder
    quantized = request.param == "quantized"
    lm = eight_bit(tmp_path / "8bit") if quantized else models.language.lm
    models = Models(
        replace(models.language, lm=elsewhere(lm, torch.bfloat16)),
        SpeechDecoder(
            elsewhere(decoder.flow, torch.float32), elsewhere(decoder.hift, torch.float32)
        ),
    )

    def choose(logits: Tensor, samplers: Sequence[object]) -> list[int]:
        assert logits.device == META
        return [7] * len(samplers)

    def silence(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        return torch.zeros(self.shape) if self.device == META else self

    monkeypatch.setattr("omnispeech.engine.runner.choose", choose)
    # the two operations that meta has no kernel for
    monkeypatch.setattr(torch, "istft", lambda spectrum, n_fft, hop, window: spectrum.real[:, 0])
    monkeypatch.setattr(Tensor, "cpu", silence)
    config = EngineConfig(kv_tokens=4096, context_length=2048)
    return Conversations(models, config, DecoderConfig(euler_steps=1, first_block=10))


def test_nothing_the_engine_makes_lies_on_another_device_than_the_models(
    engine: Conversations,
) -> None:
    callers = [Caller(engine, question(max_new_tokens=6)) for _ in range(2)]
    for _ in range(60):
        engine.step()
    for caller in callers:
        assert not [event for event in caller.events if isinstance(event, Exception)]
        assert caller.ids == ([7] * 6, [7 + golden_models().language.units.units_bias] * 48)
