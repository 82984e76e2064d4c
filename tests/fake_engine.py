"""A speech engine that follows a script, and a real server on loopback around it."""

import asyncio
import io
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import httpx
import numpy as np
import soundfile
import uvicorn
from fastapi import FastAPI

from omnispeech.config import AccessConfig, ServerConfig, TalkConfig
from omnispeech.engine.events import (
    AudioDelta,
    Done,
    EngineStatus,
    Event,
    Message,
    TextDelta,
    TurnRequest,
)
from omnispeech.server.app import DEFAULT_ACCESS, DEFAULT_TALK, create_app

RATE_HZ = 22_050
DONE = Done(
    text_finish="stop",
    speech_finish="length",
    prompt_tokens=7,
    text_tokens=2,
    units=25,
    seed=11,
    first_text_s=0.1,
    first_audio_s=0.2,
    total_s=1.0,
    audio_s=2.0,
)

Step = Event | Exception | threading.Event  # an Event of threading: wait until the test sets it


def sound(samples: int, first: int = 0) -> AudioDelta:
    """A ramp: each sample is its own number."""
    return AudioDelta(np.arange(first, first + samples).astype("<i2").tobytes())


PLAIN: tuple[Step, ...] = (TextDelta("Hel"), sound(500), TextDelta("lo"), sound(300, 500), DONE)


class FakeEngine:
    def __init__(self, *steps: Step, status: EngineStatus | None = None) -> None:
        self.sample_rate_hz = RATE_HZ
        self.steps: Sequence[Step] = steps or PLAIN
        self.requests: list[TurnRequest] = []
        self.cancelled = threading.Event()
        self._status = status or EngineStatus(ready=True)

    def status(self) -> EngineStatus:
        return self._status

    async def answer(self, request: TurnRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        whole = False
        try:
            for step in self.steps:
                if isinstance(step, threading.Event):
                    while not step.is_set():
                        await asyncio.sleep(0.002)
                elif isinstance(step, Exception):
                    whole = True
                    raise copy(step)  # the script outlives the test, its traceback need not
                else:
                    whole = isinstance(step, Done)
                    yield step
        finally:
            if not whole:
                self.cancelled.set()

    @property
    def heard(self) -> tuple[Message, ...]:
        return self.requests[-1].messages


def app_with(engine: FakeEngine, **settings: Any) -> FastAPI:
    return create_app(engine, ServerConfig(**settings))


async def call(
    engine: FakeEngine, method: str, path: str, settings: dict[str, Any] | None = None, **kw: Any
) -> httpx.Response:
    """One request without a network."""
    app = app_with(engine, **(settings or {}))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, **kw)


@contextmanager
def serving(
    engine: FakeEngine,
    talk: TalkConfig = DEFAULT_TALK,
    access: AccessConfig = DEFAULT_ACCESS,
    **settings: Any,
) -> Iterator[str]:
    """A real server on loopback; gives its address."""
    app = create_app(engine, ServerConfig(**settings), talk, access)
    frame = talk.max_frame_mb * 1_000_000
    config = uvicorn.Config(app, port=0, log_config=None, log_level="critical", ws_max_size=frame)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.005)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def tone(seconds: float, rate_hz: int = 16_000, channels: int = 1) -> np.ndarray:
    """[N] or [N, channels]: 300 Hz at half of full scale, the same in each channel."""
    wave = 0.5 * np.sin(2 * np.pi * 300 * np.arange(int(seconds * rate_hz)) / rate_hz)
    return wave if channels == 1 else np.repeat(wave[:, None], channels, axis=1)


def sound_file(
    samples: np.ndarray, rate_hz: int = 16_000, form: str = "WAV", subtype: str | None = None
) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format=form, subtype=subtype)
    return file.getvalue()
