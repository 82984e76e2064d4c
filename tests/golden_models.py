"""The golden checkpoints as one small model that hears and speaks."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnispeech.assembly import language_models
from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.checkpoint.opens2s import load_opens2s
from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import Audio, AudioDelta, Event, Message, Text, TurnRequest
from omnispeech.engine.runner import Models
from omnispeech.engine.session import Session
from omnispeech.engine.worker import Worker

GOLDEN = Path(__file__).parent / "golden"


@cache
def golden_models(*, compatible: bool = False) -> Models:
    """Replies are short: 40 units at most after the text."""
    path = GOLDEN / "opens2s" / "opens2s-tiny"
    loaded = load_opens2s(path, torch.device("cpu"), torch.float32)
    language = replace(language_models(path, loaded, compatible=compatible), unit_limit=40)
    return Models(language, load_decoder(GOLDEN / "decoder", convert=False))


def conversations(decoder: DecoderConfig | None = None, **changes: Any) -> Conversations:
    """`changes` to the settings of the engine, or to what came with the models."""
    settings = {k: v for k, v in changes.items() if k in EngineConfig.__dataclass_fields__}
    config = EngineConfig(**{"kv_tokens": 8192, "context_length": 4096, **settings})
    models = golden_models(compatible=config.compatible)
    others = {k: v for k, v in changes.items() if k not in settings}
    models = replace(models, language=replace(models.language, **others))
    return Conversations(models, config, decoder or DecoderConfig(euler_steps=2, first_block=10))


def endless_models() -> Models:
    """Every reply is as long as it may be: random weights that are asked without a seed otherwise
    end where chance has it, now and then before the first sound."""
    models = golden_models()
    return replace(
        models, language=replace(models.language, text_end=frozenset(), speech_end=frozenset())
    )


@contextmanager
def golden_worker(load: Callable[[], Models] = endless_models, **settings: Any) -> Iterator[Worker]:
    """Ready, with two rows and cheap sound; `settings` of the engine."""
    engine = EngineConfig(max_conversations=2, **settings)
    sound = DecoderConfig(euler_steps=1, first_block=10)
    with ready(Worker(load, engine, sound)) as worker:
        yield worker


@contextmanager
def ready(worker: Worker) -> Iterator[Worker]:
    """From its first turn to its end."""
    worker.start()
    try:
        while not worker.status().ready:
            assert worker.status().failure is None
            time.sleep(0.01)
        yield worker
    finally:
        worker.close()


def question(text: str = "How are you?", seconds: float = 1.0, **settings: Any) -> TurnRequest:
    """Greedy text, sampled speech, unless `settings` say otherwise."""
    sound = np.sin(np.arange(int(16000 * seconds)) * 0.1).astype(np.float32) * 0.3
    content = (Text(text), Audio(sound)) if seconds else (Text(text),)
    values = {"temperature": 0.0, "max_new_tokens": 12, "seed": 7, **settings}
    return TurnRequest(messages=(Message("user", content),), **values)


class Caller:
    """Sends one request and keeps what comes back."""

    def __init__(self, engine: Conversations, request: TurnRequest) -> None:
        self.events: list[Event | Exception] = []
        self.session: Session = engine.open(request, self.events.append)
        engine.insert(self.session)

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.events if hasattr(e, "text"))

    @property
    def pcm(self) -> bytes:
        return b"".join(e.pcm for e in self.events if isinstance(e, AudioDelta))

    @property
    def ids(self) -> tuple[list[int], list[int]]:
        return self.session.interleaver.text_ids, self.session.interleaver.unit_ids


def run(engine: Conversations, steps: int = 100_000) -> None:
    for _ in range(steps):
        if engine.idle:
            return
        engine.step()
