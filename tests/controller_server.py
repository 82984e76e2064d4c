"""A controller of OpenS2S as its protocol describes it, small, with a clock that a test sets; and
servers on loopback, each in a thread."""

import json
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from fake_engine import FakeEngine
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from omnispeech.config import ServerConfig, TalkConfig
from omnispeech.server.app import DEFAULT_TALK, create_app
from omnispeech.server.door import listen
from omnispeech.server.http import HTTPServer

SILENT_S = 30.0
PROXY_TIMEOUT_S = 5.0


@dataclass
class Entry:
    models: list[str]
    speed: int
    queue_length: int
    checked: bool
    heard_s: float


@dataclass
class Controller:
    lottery: bool = False
    now_s: float = 0.0
    workers: dict[str, Entry] = field(default_factory=dict)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # (path, body)

    def called(self, path: str) -> list[dict[str, Any]]:
        return [body for one, body in self.calls if one == path]

    def forget_the_silent(self) -> None:
        for name, entry in list(self.workers.items()):
            if entry.checked and self.now_s - entry.heard_s > SILENT_S:
                del self.workers[name]

    async def register(self, name: str, checked: bool, status: dict[str, Any] | None) -> None:
        if status is None:
            async with httpx.AsyncClient(trust_env=False) as client:
                status = (await client.post(name + "/worker_get_status")).json()
        self.workers[name] = Entry(
            status["model_names"], status["speed"], status["queue_length"], checked, self.now_s
        )

    def hear(self, name: str, queue_length: int) -> bool:
        if name not in self.workers:
            return False
        self.workers[name].queue_length = queue_length
        self.workers[name].heard_s = self.now_s
        return True

    def choose(self, model: str) -> str:
        able = {name: entry for name, entry in self.workers.items() if model in entry.models}
        if not able:
            return ""
        if self.lottery:
            return random.choices(list(able), [entry.speed for entry in able.values()])[0]
        name = min(able, key=lambda name: able[name].queue_length / able[name].speed)
        able[name].queue_length += 1
        return name

    async def proxied(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        address = self.choose(body["model"])
        if not address:
            yield json.dumps({"text": "no worker", "error_code": 2}).encode() + b"\0"
            return
        try:
            async with (
                httpx.AsyncClient(timeout=PROXY_TIMEOUT_S, trust_env=False) as client,
                client.stream("POST", f"{address}/worker_generate_stream", json=body) as response,
            ):
                async for piece in response.aiter_raw():
                    yield piece
        except httpx.HTTPError:
            yield json.dumps({"text": "worker timeout", "error_code": 3}).encode() + b"\0"

    def app(self) -> FastAPI:
        app = FastAPI()

        async def body_of(request: Request) -> dict[str, Any]:
            body = json.loads(await request.body() or b"{}")
            self.calls.append((request.url.path, body))
            return body

        @app.post("/register_worker")
        async def register_worker(request: Request) -> None:
            body = await body_of(request)
            await self.register(
                body["worker_name"], body["check_heart_beat"], body["worker_status"]
            )

        @app.post("/receive_heart_beat")
        async def receive_heart_beat(request: Request) -> dict[str, bool]:
            body = await body_of(request)
            return {"exist": self.hear(body["worker_name"], body["queue_length"])}

        @app.post("/list_models")
        async def list_models(request: Request) -> dict[str, list[str]]:
            models = {model for entry in self.workers.values() for model in entry.models}
            return {"models": sorted(models)}

        @app.post("/get_worker_address")
        async def get_worker_address(request: Request) -> dict[str, str]:
            return {"address": self.choose((await body_of(request))["model"])}

        @app.post("/worker_generate_stream")
        async def generate(request: Request) -> StreamingResponse:
            return StreamingResponse(self.proxied(await body_of(request)))

        return app


def until(true: Callable[[], object], within_s: float = 10.0) -> None:
    end_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def run_in_thread(server: uvicorn.Server, **where: Any) -> threading.Thread:
    thread = threading.Thread(target=server.run, kwargs=where, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.005)
    return thread


@contextmanager
def controller_on_loopback(app: Any, port: int = 0) -> Iterator[str]:
    config = uvicorn.Config(
        app, port=port, log_config=None, log_level="critical", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = run_in_thread(server)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@dataclass
class Worker:
    """The product's own server around a scripted engine."""

    http: HTTPServer
    thread: threading.Thread
    url: str

    def ended(self, within_s: float) -> bool:
        self.thread.join(within_s)
        return not self.thread.is_alive()


@contextmanager
def worker_on_loopback(
    engine: FakeEngine, talk: TalkConfig = DEFAULT_TALK, **settings: Any
) -> Iterator[Worker]:
    door = listen(ServerConfig(port=0))
    config = ServerConfig(port=door.getsockname()[1], **settings)
    http = HTTPServer(create_app(engine, config, talk), config, talk)
    http.config.log_level = "critical"
    worker = Worker(http, run_in_thread(http, sockets=[door]), config.address)
    try:
        yield worker
    finally:
        http.force_exit = http.should_exit = True
        assert worker.ended(within_s=10)
