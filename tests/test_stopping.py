"""What a stop signal does to a server: the door, the replies under way, the exit status."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from controller_server import Worker, until, worker_on_loopback
from fake_engine import DONE, FakeEngine, sound, sound_file, tone
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from omnispeech.engine.events import TextDelta

TESTS = Path(__file__).parent
PATH = "/worker_generate_stream"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
WAV = sound_file(tone(0.2))


@contextmanager
def replying(worker: Worker) -> Iterator[Iterator[bytes]]:
    """A reply under way, its first piece read, while the server has got a stop signal."""
    with httpx.stream("POST", worker.url + PATH, json=HELLO, timeout=20) as response:
        pieces = response.iter_raw()
        next(pieces)
        worker.http.handle_exit(signal.SIGTERM, None)
        until(lambda: httpx.get(f"{worker.url}/ready").status_code == 503)
        yield pieces


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def worker(gate: threading.Event) -> Iterator[Worker]:
    with worker_on_loopback(FakeEngine(TextDelta("Hel"), gate, DONE)) as one:
        yield one


def test_a_reply_under_way_is_finished_and_then_the_server_ends(
    worker: Worker, gate: threading.Event
) -> None:
    with replying(worker) as pieces:
        assert not worker.ended(within_s=0.5)
        gate.set()
        assert json.loads(b"".join(pieces).removesuffix(b"\0"))["finalize"]
        assert worker.ended(within_s=5)


def test_probes_are_answered_while_replies_are_finished(worker: Worker) -> None:
    with replying(worker):
        ready = httpx.get(f"{worker.url}/ready")
        assert (ready.status_code, ready.headers["retry-after"]) == (503, "5")
        assert ready.json()["status"] == "stopping"
        assert ready.json()["error"]["message"].startswith("the server is stopping; ")
        assert httpx.head(f"{worker.url}/health").status_code == 200
        assert "omnispeech_ready 0.0" in httpx.get(f"{worker.url}/metrics").text


def test_new_requests_are_refused_with_the_reason(worker: Worker) -> None:
    with replying(worker):
        speech = httpx.post(f"{worker.url}/v1/speech", content=WAV)
        objects = httpx.post(worker.url + PATH, json=HELLO)
    for response in (speech, objects):
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert "the server is stopping" in response.text


def test_controllers_are_told_of_no_model_while_replies_are_finished(worker: Worker) -> None:
    with replying(worker):
        assert httpx.post(f"{worker.url}/worker_get_status").json()["model_names"] == []


def test_a_spoken_answer_is_finished_and_then_the_connection_is_closed(
    worker: Worker, gate: threading.Event
) -> None:
    with connect(worker.url.replace("http", "ws") + "/ws/stream?events=1") as socket:
        ask(socket)
        assert json.loads(socket.recv())["text"] == "Hel"
        worker.http.handle_exit(signal.SIGTERM, None)
        assert not worker.ended(within_s=0.5)
        gate.set()
        assert json.loads(socket.recv())["type"] == "end"
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
        assert worker.ended(within_s=5)


def test_a_trigger_after_the_signal_is_refused_in_its_connection(worker: Worker) -> None:
    with connect(worker.url.replace("http", "ws") + "/ws/stream?events=1") as socket:
        with replying(worker):
            ask(socket)
            told = json.loads(socket.recv())
        assert (told["type"], told["error"]) == ("error", "NotReady")


def ask(socket: Any) -> None:
    socket.send(bytes(3200))
    socket.send(json.dumps({"type": "trigger_response"}))


def test_an_idle_server_ends_at_once(worker: Worker) -> None:
    with connect(worker.url.replace("http", "ws") + "/ws/stream"):  # a caller that says nothing
        worker.http.handle_exit(signal.SIGTERM, None)
        assert worker.ended(within_s=5)


def test_a_reply_over_the_limit_is_cut_and_its_caller_told(gate: threading.Event) -> None:
    engine = FakeEngine(TextDelta("Hel"), gate, DONE)
    with worker_on_loopback(engine, drain_s=0.5) as worker, replying(worker) as pieces:
        last = json.loads(b"".join(pieces).removesuffix(b"\0"))
        assert (last["finalize"], last["error_code"]) == (True, 1)
        assert last["reason"].startswith("the server stops, and had no time left")
        assert worker.ended(within_s=5)
        assert engine.cancelled.is_set()


def test_a_cut_reply_of_events_ends_with_the_error(gate: threading.Event) -> None:
    engine = FakeEngine(TextDelta("Hel"), gate, DONE)
    with (
        worker_on_loopback(engine, drain_s=0.2) as worker,
        httpx.stream("POST", f"{worker.url}/v1/speech?format=events", content=WAV) as response,
    ):
        lines = response.iter_lines()
        assert next(lines) == "event: text"
        worker.http.handle_exit(signal.SIGTERM, None)
        name, data = list(lines)[-3:-1]
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["type"] == "Stopped"


def test_a_cut_reply_of_sound_breaks_the_connection(gate: threading.Event) -> None:
    """What is no sound of the reply is never sent as if it were."""
    with (
        worker_on_loopback(FakeEngine(sound(500), gate, DONE), drain_s=0.2) as worker,
        httpx.stream("POST", f"{worker.url}/v1/speech?format=pcm", content=WAV) as response,
    ):
        pieces = response.iter_raw()
        next(pieces)
        worker.http.handle_exit(signal.SIGTERM, None)
        with pytest.raises(httpx.RemoteProtocolError):
            next(pieces)


def test_a_cut_answer_is_told_in_its_connection_before_it_closes(gate: threading.Event) -> None:
    engine = FakeEngine(TextDelta("Hel"), gate, DONE)
    with (
        worker_on_loopback(engine, drain_s=0.2) as worker,
        connect(worker.url.replace("http", "ws") + "/ws/stream?events=1") as socket,
    ):
        ask(socket)
        assert json.loads(socket.recv())["text"] == "Hel"
        worker.http.handle_exit(signal.SIGTERM, None)
        told = json.loads(socket.recv())
        assert (told["type"], told["error"]) == ("error", "Stopped")
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012


def test_a_request_in_the_queue_is_refused_when_the_time_is_over(gate: threading.Event) -> None:
    """Nothing was sent for it yet: it gets a status."""
    engine = FakeEngine(gate, DONE)
    with worker_on_loopback(engine, drain_s=0.5) as worker:
        answers: list[httpx.Response] = []

        def speak() -> None:
            answers.append(httpx.post(f"{worker.url}/v1/speech", content=WAV, timeout=10))

        caller = threading.Thread(target=speak)
        caller.start()
        until(lambda: engine.requests)
        worker.http.handle_exit(signal.SIGTERM, None)
        caller.join(10)
    assert (answers[0].status_code, answers[0].headers["retry-after"]) == (503, "5")


@pytest.mark.parametrize("stays_s", [0.3, 600.0])
def test_talks_are_told_and_waited_for_no_longer_than_replies(stays_s: float) -> None:
    told, left = threading.Event(), threading.Event()

    async def farewell() -> None:
        told.set()
        await asyncio.sleep(stays_s)
        left.set()

    with worker_on_loopback(FakeEngine(), drain_s=0.5) as worker:
        worker.http._admission.on_stop(farewell)
        worker.http.handle_exit(signal.SIGTERM, None)
        assert worker.ended(within_s=8)
    assert told.is_set()
    assert left.is_set() == (stays_s < 1)


def test_the_second_signal_ends_at_once(worker: Worker) -> None:
    with replying(worker) as pieces:
        worker.http.handle_exit(signal.SIGTERM, None)
        assert worker.ended(within_s=5)
        assert json.loads(b"".join(pieces).removesuffix(b"\0"))["error_code"] == 1


def test_the_second_signal_tells_who_still_waits_why(gate: threading.Event) -> None:
    engine = FakeEngine(gate, DONE)
    with (
        worker_on_loopback(engine) as worker,
        ThreadPoolExecutor(1) as callers,
        connect(worker.url.replace("http", "ws") + "/v1/realtime") as talk,
    ):
        talk.recv()
        begin_response(talk)
        until(lambda: len(engine.requests) == 1)
        waiting = callers.submit(httpx.post, f"{worker.url}/v1/speech", content=WAV, timeout=10)
        until(lambda: len(engine.requests) == 2)
        for _ in range(2):
            worker.http.handle_exit(signal.SIGTERM, None)
        answer = waiting.result(10)
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                talk.recv(10)
        assert worker.ended(within_s=5)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["type"] == "Stopped"
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
    assert closed.value.rcvd.reason.startswith("the server is stopping")


def begin_response(talk: Any) -> None:
    content = [{"type": "input_text", "text": "hello"}]
    item = {"type": "message", "role": "user", "content": content}
    talk.send(json.dumps({"type": "conversation.item.create", "item": item}))
    talk.send(json.dumps({"type": "response.create"}))


SERVER = """
import sys, threading, time
from fake_engine import DONE, FakeEngine
from omnispeech.config import ServerConfig
from omnispeech.engine.events import TextDelta
from omnispeech.logs import log_to_stdout
from omnispeech.server.app import create_app
from omnispeech.server.door import listen
from omnispeech.server.http import HTTPServer

class Slow(threading.Event):
    end_s = None

    def is_set(self):
        self.end_s = self.end_s or time.monotonic() + float(sys.argv[1])
        return time.monotonic() > self.end_s

log_to_stdout()
gate = Slow()
config = ServerConfig(port=0, drain_s=float(sys.argv[2]))
with listen(config) as door:
    HTTPServer(create_app(FakeEngine(TextDelta("a"), gate, DONE), config), config).run([door])
print("cleaned up")
"""


LOADING = """
import sys, torch
from omnispeech.cli import worker
from omnispeech.commands import serve
from omnispeech.engine.worker import Worker

def load():
    weights = torch.randn(1000, 1000)
    while True:
        weights = torch.tanh(weights @ weights)

serve.build_worker = lambda settings: Worker(load)
sys.exit(worker(["--port", "0"]))
"""


@contextmanager
def process(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own, and its address."""
    python = [sys.executable, "-u", "-c", *command]
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(python, cwd=TESTS, text=True, stdout=pipe, stderr=both) as one:
        try:
            assert one.stdout is not None
            lines = iter(one.stdout.readline, "")
            yield one, next(m[1] for line in lines if (m := re.search(r"on (http://\S+)", line)))
        finally:
            one.kill()


@contextmanager
def stopped_in_a_reply(
    reply_s: str, drain_s: str
) -> Iterator[tuple[subprocess.Popen[str], str, Iterator[bytes]]]:
    """A server that was sent SIGTERM behind the first piece of a reply, its address, the rest."""
    with (
        process(SERVER, reply_s, drain_s) as (server, url),
        httpx.stream("POST", url + PATH, json=HELLO, timeout=20) as response,
    ):
        rest = response.iter_raw()
        next(rest)
        server.send_signal(signal.SIGTERM)
        yield server, url, rest


def test_sigterm_finishes_the_replies_and_exits_with_zero() -> None:
    with stopped_in_a_reply("1", "30") as (server, _, pieces):
        assert b'"finalize": true' in b"".join(pieces)
        assert server.wait(10) == 0
        assert server.stdout is not None and server.stdout.read().endswith("cleaned up\n")


def test_a_second_sigterm_does_not_wait_for_replies() -> None:
    with stopped_in_a_reply("600", "30") as (server, url, _):
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0


def test_sigterm_tells_the_callers_of_replies_that_it_cuts() -> None:
    with stopped_in_a_reply("600", "0.5") as (server, _, pieces):
        assert b'"error_code": 1' in b"".join(pieces)
        assert server.wait(10) == 0


STARTING = """
import os, signal, sys
from omnispeech.cli import worker
from omnispeech.commands import serve
serve.build_worker = lambda settings: os.kill(os.getpid(), signal.SIGTERM)
sys.exit(worker([]))
"""


def test_sigterm_has_a_handler_before_anything_listens() -> None:
    """Process 1 of a container has no default for it: the signal would be lost."""
    assert subprocess.run([sys.executable, "-c", STARTING]).returncode == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_server_that_is_still_loading_at_once(number: signal.Signals) -> None:
    """A thread inside torch would abort the end of the interpreter."""
    with process(LOADING) as (server, url):
        assert httpx.get(f"{url}/ready").json()["status"] == "loading"
        server.send_signal(number)
        assert server.wait(8) == 0
        assert server.stdout is not None and "terminate" not in server.stdout.read()


def test_under_nohup_a_closed_terminal_ends_no_server() -> None:
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    with process(ignored + LOADING) as (server, url):
        server.send_signal(signal.SIGHUP)
        assert httpx.get(f"{url}/ready").json()["status"] == "loading"
        server.send_signal(signal.SIGTERM)
        assert server.wait(8) == 0
