"""The engine on quantized language models: nothing in it knows of them."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import Caller, golden_models, question, run
from quantized_models import (
    GEMM,
    INT8,
    dequantized,
    quantize_language_model,
    quantize_opens2s,
)

from omnispeech.assembly import language_models
from omnispeech.checkpoint.files import assign_weights, build_on_meta
from omnispeech.checkpoint.opens2s import load_opens2s
from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import AudioDelta, Done, TextDelta
from omnispeech.engine.runner import Models
from omnispeech.engine.worker import Worker
from omnispeech.models.omnispeech import OmniSpeech

OPENS2S = Path(__file__).parent / "golden" / "opens2s" / "opens2s-tiny"
CPU = torch.device("cpu")
ENGINE = EngineConfig(kv_tokens=8192, context_length=4096)
DECODER = DecoderConfig(euler_steps=1, first_block=10)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("quantized")
    quantize_language_model(OPENS2S, path / "llm")
    quantize_language_model(OPENS2S, path / "speech_lm", INT8, part="speech_lm")
    quantize_opens2s(OPENS2S, path / "8bit")
    yield path


def quantized_models(base: Path, kernel: str, **parts: Path) -> Models:
    loaded = load_opens2s(base, CPU, torch.float32, kernel=kernel, **parts)
    return Models(replace(language_models(base, loaded), unit_limit=40), golden_models().decoder)


def plain_models(weights: dict[str, torch.Tensor]) -> Models:
    """The same numbers in a model of plain linears: `weights` in place of those stored."""
    language = golden_models().language
    model: Any = build_on_meta(lambda: OmniSpeech(language.lm.config))
    assign_weights(model, {**language.lm.state_dict(), **weights}, "plain")
    return Models(replace(language, lm=model), golden_models().decoder)


def under(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in weights.items()}


def replies(models: Models) -> list[tuple[list[int], list[int]]]:
    """Token and unit ids of three turns that share every call, the text greedy."""
    engine = Conversations(models, ENGINE, DECODER)
    requests = [question(text, seed=i) for i, text in enumerate(("How are you?", "Why?", "Hi"))]
    callers = [Caller(engine, request) for request in requests]
    run(engine)
    for caller in callers:
        assert isinstance(caller.events[-1], Done)
        assert caller.pcm
    return [caller.ids for caller in callers]


def test_a_quantized_llm_says_what_its_codes_mean(directory: Path) -> None:
    plain = plain_models(under("llm_model", dequantized(directory / "llm", GEMM)))
    found = replies(quantized_models(OPENS2S, "reference", llm=directory / "llm"))
    assert found == replies(plain)
    assert all(len(text) > 3 for text, _ in found)


def test_a_quantized_speech_lm_says_what_its_codes_mean(directory: Path) -> None:
    path = directory / "speech_lm"
    plain = plain_models(under("tts_lm_model", dequantized(path, INT8)))
    assert replies(quantized_models(OPENS2S, "reference", speech_lm=path)) == replies(plain)


def test_a_whole_model_in_eight_bits_says_what_its_codes_mean(directory: Path) -> None:
    path = directory / "8bit"
    plain = plain_models(dequantized(path, INT8))
    assert replies(quantized_models(path, "reference")) == replies(plain)


def test_the_kernels_of_torch_serve_turns(directory: Path) -> None:
    found = replies(quantized_models(OPENS2S, "torch", llm=directory / "llm"))
    exact = replies(quantized_models(OPENS2S, "reference", llm=directory / "llm"))
    assert [text[0] for text, _ in found] == [text[0] for text, _ in exact]


async def test_a_worker_serves_a_quantized_llm(directory: Path) -> None:
    worker = Worker(
        lambda: quantized_models(OPENS2S, "auto", llm=directory / "llm"), ENGINE, DECODER
    )
    worker.start()
    try:
        while not worker.status().ready:
            assert worker.status().failure is None
            await asyncio.sleep(0.01)
        events = [event async for event in worker.answer(question())]
    finally:
        worker.close()
    assert any(isinstance(event, TextDelta) for event in events)
    assert any(isinstance(event, AudioDelta) for event in events)
