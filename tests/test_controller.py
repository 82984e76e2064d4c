"""Registration with a controller, against a controller of the tests' own and a clock of theirs."""

import asyncio
import json
import logging
import socket
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from controller_server import (
    Controller,
    controller_on_loopback,
    until,
    worker_on_loopback,
)
from fake_engine import DONE, FakeEngine, call

from omnispeech.config import ServerConfig
from omnispeech.engine.events import EngineStatus, TextDelta
from omnispeech.errors import ConfigError
from omnispeech.once import free_port
from omnispeech.server.controller import BEAT_S, Registration, retry_pause_s
from omnispeech.server.worker_api import WorkerStatus

WORKER = "http://worker:8000"
HELLO = {"model": "omnispeech", "messages": [{"role": "user", "content": "hello"}]}
LOGGER = "omnispeech.server.controller"


class Time:
    """Goes on only when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._asleep: list[tuple[float, asyncio.Future[None]]] = []
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asleep.append((self.now_s + seconds, wake))
        await wake

    async def pass_by(self, seconds: float) -> None:
        """Everything that falls due in it has happened afterwards."""
        end_s = self.now_s + seconds
        await settled()
        while due := [at for at, wake in self._asleep if at <= end_s and not wake.done()]:
            self.now_s = min(due)
            for at, wake in self._asleep:
                if at <= self.now_s and not wake.done():
                    wake.set_result(None)
            await settled()
        self.now_s = end_s


async def settled() -> None:
    """Calls without a network have been made and answered."""
    for _ in range(100):
        await asyncio.sleep(0)


@dataclass
class Scene:
    """A registration that runs, a controller without a network, and the time of both."""

    controller: Controller = field(default_factory=Controller)
    time: Time = field(default_factory=Time)
    status: WorkerStatus = field(
        default_factory=lambda: WorkerStatus(model_names=["omnispeech"], queue_length=0)
    )
    answer: Callable[[httpx.Request], httpx.Response] | None = None  # instead of the controller's

    def __post_init__(self) -> None:
        self._app = httpx.ASGITransport(self.controller.app())
        self.registration = Registration(
            "http://controller:21001/",
            WORKER + "/",
            lambda: self.status,
            httpx.MockTransport(self._answered),
            self.time.sleep,
        )

    async def _answered(self, request: httpx.Request) -> httpx.Response:
        if self.answer is not None:
            return self.answer(request)
        return await self._app.handle_async_request(request)

    async def pass_by(self, seconds: float) -> None:
        self.controller.now_s = self.time.now_s + seconds
        await self.time.pass_by(seconds)

    def set_queue(self, length: int) -> None:
        self.status = WorkerStatus(model_names=["omnispeech"], queue_length=length)

    @property
    def beats(self) -> list[dict[str, Any]]:
        return self.controller.called("/receive_heart_beat")

    @property
    def registrations(self) -> list[dict[str, Any]]:
        return self.controller.called("/register_worker")


@asynccontextmanager
async def running(scene: Scene) -> AsyncIterator[Scene]:
    task = asyncio.create_task(scene.registration.run())
    await settled()
    try:
        yield scene
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def refuse(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("connection refused")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


async def test_a_worker_registers_with_its_address_and_status() -> None:
    async with running(Scene()) as scene:
        assert scene.registrations == [
            {
                "worker_name": WORKER,
                "check_heart_beat": True,
                "worker_status": {"model_names": ["omnispeech"], "speed": 1, "queue_length": 0},
            }
        ]
        assert scene.beats == []


async def test_nothing_is_told_before_the_models_are_ready() -> None:
    scene = Scene(status=WorkerStatus(model_names=[], queue_length=0))
    async with running(scene):
        await scene.pass_by(100.0)
        assert scene.controller.calls == []
        scene.set_queue(0)
        await scene.pass_by(1.0)
        assert len(scene.registrations) == 1


async def test_a_heartbeat_every_15_seconds_keeps_the_worker_known() -> None:
    async with running(Scene()) as scene:
        await scene.pass_by(14.9)
        assert scene.beats == []
        await scene.pass_by(0.1)
        assert scene.beats == [{"worker_name": WORKER, "queue_length": 0}]
        for _ in range(10):
            await scene.pass_by(15.0)
            scene.controller.forget_the_silent()
        assert WORKER in scene.controller.workers
        assert (len(scene.beats), len(scene.registrations)) == (11, 1)


async def test_a_change_of_the_queue_is_told_within_a_second() -> None:
    async with running(Scene()) as scene:
        await scene.pass_by(5.0)
        scene.set_queue(3)
        await scene.pass_by(1.0)
        assert [beat["queue_length"] for beat in scene.beats] == [3]
        scene.set_queue(0)
        await scene.pass_by(1.0)
        assert [beat["queue_length"] for beat in scene.beats] == [3, 0]


async def test_many_turns_are_no_more_than_a_heartbeat_a_second() -> None:
    async with running(Scene()) as scene:
        for turn in range(1000):
            scene.set_queue(turn % 7 + 1)
            await scene.time.pass_by(0.01)
        assert 5 <= len(scene.beats) <= 10


async def test_a_worker_that_is_not_known_any_more_registers_again_at_once() -> None:
    async with running(Scene()) as scene:
        scene.controller.workers.clear()  # it was started again
        await scene.pass_by(15.0)
        assert WORKER in scene.controller.workers
        assert (len(scene.beats), len(scene.registrations)) == (1, 2)


async def test_a_controller_that_forgets_at_once_is_not_flooded() -> None:
    def forgetful(request: httpx.Request) -> httpx.Response:
        calls.append(request.url.path)
        return httpx.Response(200, json={"exist": False}, request=request)

    calls: list[str] = []
    async with running(Scene(answer=forgetful)) as scene:
        await scene.pass_by(60.0)
    assert len(calls) == 1 + 4 * 2


@pytest.mark.parametrize("failed_s", [0.0, 40.0, 3600.0])
async def test_a_controller_that_comes_later_has_the_worker_soon(failed_s: float) -> None:
    scene = Scene(answer=refuse)
    async with running(scene):
        await scene.pass_by(failed_s)
        scene.answer = None
        await scene.pass_by(BEAT_S)
        assert WORKER in scene.controller.workers


async def test_a_controller_that_goes_in_between_has_the_worker_soon_after() -> None:
    async with running(Scene()) as scene:
        await scene.pass_by(20.0)
        scene.answer = refuse
        await scene.pass_by(300.0)
        scene.controller.forget_the_silent()
        assert scene.controller.workers == {}
        scene.answer = None
        await scene.pass_by(BEAT_S)
        assert WORKER in scene.controller.workers


async def test_pauses_grow_while_the_controller_does_not_answer() -> None:
    async with running(Scene(answer=refuse)) as scene:
        await scene.pass_by(100.0)
    longest = [1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    for pause, most in zip(scene.time.pauses[:6], longest, strict=True):
        assert most / 2 <= pause <= most


@pytest.mark.parametrize(("draw", "share"), [(0.0, 1.0), (0.5, 0.75), (1.0, 0.5)])
def test_a_retry_pause_doubles_up_to_the_pause_of_heartbeats(draw: float, share: float) -> None:
    pauses = [retry_pause_s(failures, draw) for failures in (1, 2, 3, 4, 5, 6, 10_000)]
    assert pauses == [share * most for most in (1, 2, 4, 8, 15, 15, 15)]


async def test_workers_come_back_at_different_moments() -> None:
    pauses = []
    for _ in range(20):
        async with running(Scene(answer=refuse)) as scene:
            pauses.append(scene.time.pauses[0])
    assert max(pauses) - min(pauses) > 0.1


async def test_a_lasting_failure_is_one_warning_and_its_end_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    scene = Scene(answer=refuse)
    async with running(scene):
        await scene.pass_by(600.0)
        (warning,) = warnings(caplog)
        assert "the controller http://controller:21001: connection refused" in warning
        assert len(caplog.records) == 1
        caplog.clear()
        scene.answer = None
        await scene.pass_by(60.0)
        told = [record.getMessage() for record in caplog.records]
    assert told[0] == f"registered with the controller http://controller:21001 as {WORKER}"
    assert "answers again after" in told[1] and len(told) == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"status_code": 500}, "its answer has status 500"),
        ({"status_code": 404, "text": "not found"}, "its answer has status 404"),
        ({"status_code": 302, "headers": {"location": "/"}}, "its answer has status 302"),
        ({"status_code": 200, "html": "<p>hello</p>"}, "its answer is not that of a controller"),
        ({"status_code": 200, "content": b""}, "its answer is not that of a controller"),
        ({"status_code": 200, "content": b"\xff"}, "its answer is not that of a controller"),
        ({"status_code": 200, "content": b"[" * 50_000}, "its answer is not that of a controller"),
    ],
)
async def test_wrong_answers_are_told_and_do_not_end_the_registration(
    answer: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(answer=lambda request: httpx.Response(**answer, request=request))
    async with running(scene):
        assert [reason in line for line in warnings(caplog)] == [True]
        await scene.pass_by(50.0)
        assert len(warnings(caplog)) == 1
        scene.answer = None
        await scene.pass_by(BEAT_S)
        assert WORKER in scene.controller.workers


@pytest.mark.parametrize("answer", [None, [], {}, {"exist": "no"}, {"exist": 0}, "x"])
async def test_a_heartbeat_answered_with_something_else_is_a_failure(
    answer: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(Scene()) as scene:
        scene.answer = lambda request: httpx.Response(200, json=answer, request=request)
        await scene.pass_by(15.0)
        assert "its answer is not that of a controller" in warnings(caplog)[0]
        assert len(scene.registrations) == 1


async def test_a_name_that_no_host_can_have_is_told_as_such(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def look_up(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=("a" * 64).encode("idna"))

    async with running(Scene(answer=look_up)):
        assert "no host can have such a name" in warnings(caplog)[0]


@pytest.mark.parametrize("error", [httpx.ReadTimeout(""), TimeoutError()])
async def test_a_slow_controller_is_told_with_the_limit(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def slow(request: httpx.Request) -> httpx.Response:
        raise error

    async with running(Scene(answer=slow)):
        assert "no answer within 5 s" in warnings(caplog)[0]


class Endless(httpx.AsyncByteStream):
    read = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while Endless.read < 1 << 30:
            Endless.read += 1 << 16
            yield b" " * (1 << 16)


async def test_an_answer_without_end_is_not_read_to_it(caplog: pytest.LogCaptureFixture) -> None:
    async with running(Scene(answer=lambda request: httpx.Response(200, stream=Endless()))):
        assert "its answer is not that of a controller" in warnings(caplog)[0]
        assert Endless.read <= 1 << 17


async def test_a_worker_that_leaves_offers_no_model_and_is_not_dispatched_to() -> None:
    async with running(Scene()) as scene:
        assert scene.controller.choose("omnispeech") == WORKER
        await scene.registration.leave()
        assert scene.registrations[-1]["worker_status"]["model_names"] == []
        assert scene.controller.choose("omnispeech") == ""


async def test_a_worker_that_never_registered_leaves_without_a_word() -> None:
    scene = Scene()
    await scene.registration.leave()
    assert scene.controller.calls == []


async def test_a_stop_during_the_first_registration_takes_it_back() -> None:
    offered: list[list[str]] = []

    async def slow(request: httpx.Request) -> httpx.Response:
        offered.append(json.loads(request.content)["worker_status"]["model_names"])
        if len(offered) == 1:
            await asyncio.Event().wait()  # it has heard, and its answer is on its way
        return httpx.Response(200, json=None)

    status = WorkerStatus(model_names=["omnispeech"], queue_length=0)
    registration = Registration("http://c", WORKER, lambda: status, httpx.MockTransport(slow))
    task = asyncio.create_task(registration.run())
    await settled()
    task.cancel()
    await asyncio.wait([task])
    await registration.leave()
    assert offered == [["omnispeech"], []]


async def test_a_controller_that_is_gone_does_not_disturb_leaving() -> None:
    async with running(Scene()) as scene:
        scene.answer = refuse
        await scene.registration.leave()


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        ({"port": 8001}, "http://127.0.0.1:8001"),
        ({"host": "10.0.0.7"}, "http://10.0.0.7:8000"),
        ({"host": "::1"}, "http://[::1]:8000"),
        ({"host": "0.0.0.0", "worker_address": "https://gpu7/worker"}, "https://gpu7/worker"),
    ],
)
def test_the_address_is_that_of_the_server_unless_another_is_given(
    settings: dict[str, Any], address: str
) -> None:
    assert ServerConfig(controller="http://c:21001", **settings).address == address


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_an_address_that_means_every_one_needs_another_for_the_controller(host: str) -> None:
    with pytest.raises(ConfigError, match="give --worker-address"):
        ServerConfig(host=host, controller="http://c:21001")
    assert ServerConfig(host=host).controller == ""


@pytest.mark.parametrize("name", ["controller", "worker_address"])
@pytest.mark.parametrize(
    "url",
    ["c:21001", "ftp://c", "http://", "http://:80", "http://c:x", "http://c:99999", "http://c:0"]
    + ["http://a b", "http://c/?x=1", "http://[::1", "http://me:secret@c", "yes"],
)
def test_what_is_no_url_is_refused(name: str, url: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.*; allowed: a URL such as"):
        ServerConfig(**{name: url})


# Over sockets: our server, the controller, and clients of the controller.


def spoken(url: str) -> list[dict[str, Any]]:
    body = httpx.post(f"{url}/worker_generate_stream", json=HELLO).content
    return [json.loads(item) for item in body.split(b"\0")[:-1]]


@pytest.mark.parametrize("lottery", [False, True])
def test_a_request_to_the_controller_is_answered_by_this_worker(lottery: bool) -> None:
    controller = Controller(lottery=lottery)
    with controller_on_loopback(controller.app()) as url:
        assert spoken(url) == [{"text": "no worker", "error_code": 2}]
        with worker_on_loopback(FakeEngine(), controller=url) as worker:
            until(lambda: controller.workers)
            assert list(controller.workers) == [worker.url]
            assert httpx.post(f"{url}/list_models").json() == {"models": ["omnispeech"]}
            assert spoken(url) == spoken(worker.url)
            assert [item["finalize"] for item in spoken(url)] == [False] * 4 + [True]


def test_a_reply_through_the_controller_arrives_as_it_is_made() -> None:
    gate, controller = threading.Event(), Controller()
    engine = FakeEngine(TextDelta("Hel"), gate, DONE)
    with (
        controller_on_loopback(controller.app()) as url,
        worker_on_loopback(engine, controller=url),
    ):
        until(lambda: controller.workers)
        with httpx.stream("POST", f"{url}/worker_generate_stream", json=HELLO) as response:
            pieces = response.iter_raw()
            assert b'"Hel"' in next(pieces)
            gate.set()
            assert b'"finalize": true' in b"".join(pieces)


def test_a_controller_that_asks_the_worker_itself_gets_its_status() -> None:
    """As when somebody registers it by hand: no status is given and no heartbeat is expected."""
    controller = Controller()
    engine = FakeEngine(status=EngineStatus(ready=True, running=2, waiting=1))
    with controller_on_loopback(controller.app()) as url, worker_on_loopback(engine) as worker:
        body = {"worker_name": worker.url, "check_heart_beat": False, "worker_status": None}
        httpx.post(f"{url}/register_worker", json=body).raise_for_status()
        entry = controller.workers[worker.url]
        assert (entry.models, entry.speed, entry.queue_length) == (["omnispeech"], 1, 3)


def test_a_controller_may_come_late_and_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # not for a controller
    engine, first, second = FakeEngine(), Controller(), Controller()
    port = free_port()
    with worker_on_loopback(engine, controller=f"http://127.0.0.1:{port}") as worker:
        time.sleep(0.2)  # the first call has failed
        with controller_on_loopback(first.app(), port):
            until(lambda: first.workers)
        with controller_on_loopback(second.app(), port):
            engine._status = EngineStatus(ready=True, running=2)
            until(lambda: second.workers)
            assert second.workers[worker.url].queue_length == 2


@pytest.mark.parametrize("drain_s", [30.0, 0.0])
def test_a_stopped_server_leaves_its_controller(drain_s: float) -> None:
    controller = Controller()
    with controller_on_loopback(controller.app()) as url:
        with worker_on_loopback(FakeEngine(), controller=url, drain_s=drain_s) as worker:
            until(lambda: controller.workers)
            worker.http.stop()
            assert worker.ended(within_s=5)
        assert spoken(url) == [{"text": "no worker", "error_code": 2}]


async def test_status_names_no_model_until_there_is_one() -> None:
    engine = FakeEngine(status=EngineStatus(ready=False))
    response = await call(engine, "POST", "/worker_get_status")
    assert response.json() == {"model_names": [], "speed": 1, "queue_length": 0}


@contextmanager
def hanging() -> Iterator[str]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        yield f"http://127.0.0.1:{door.getsockname()[1]}"


def request_times(url: str) -> list[float]:
    times = []
    with httpx.Client(base_url=url) as client:
        for _ in range(40):
            began = time.perf_counter()
            assert client.post("/worker_generate_stream", json=HELLO).status_code == 200
            times.append(time.perf_counter() - began)
    return times


def test_c1_a_hanging_controller_slows_no_request() -> None:
    """The original calls its controller within the request, and for ever if it does not answer."""
    with worker_on_loopback(FakeEngine()) as worker:
        alone = request_times(worker.url)
    with hanging() as url, worker_on_loopback(FakeEngine(), controller=url) as worker:
        beside = request_times(worker.url)
        worker.http.stop()
        assert worker.ended(within_s=4)
    assert statistics.median(beside) < 3 * statistics.median(alone) + 0.02
    assert max(beside) < 1.0  # a call of the controller may take 5 s
