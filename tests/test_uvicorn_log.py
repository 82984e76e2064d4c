"""What the log of a server does not hold: a line for each probe, a traceback for each cut reply,
the query of any request."""

import logging
import threading

import httpx
import pytest
from controller_server import worker_on_loopback
from fake_engine import DONE, FakeEngine, sound, sound_file, tone
from websockets.sync.client import connect

from omnispeech.engine.events import EngineStatus, TextDelta


def messages(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == name]


@pytest.mark.parametrize("ready", [True, False])
def test_probes_leave_no_line_and_other_requests_do(
    ready: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(status=EngineStatus(ready=ready))
    with worker_on_loopback(engine) as worker, httpx.Client(base_url=worker.url) as client:
        for path in ("/health", "/ready?from=probe", "/metrics"):
            for method in ("GET", "HEAD"):
                client.request(method, path)
        client.post("/health")
        client.get("/healthy")
        client.post("/worker_get_status")
    told = [message.partition('"')[2] for message in messages(caplog, "uvicorn.access")]
    assert told == [
        'POST /health HTTP/1.1" 405',
        'GET /healthy HTTP/1.1" 404',
        'POST /worker_get_status HTTP/1.1" 200',
    ]


def test_queries_stand_in_no_line(caplog: pytest.LogCaptureFixture) -> None:
    with worker_on_loopback(FakeEngine()) as worker:
        httpx.post(f"{worker.url}/v1/speech?system=secret", content=b"")
        with connect(worker.url.replace("http", "ws") + "/ws/stream?token=secret"):
            pass
    assert '"POST /v1/speech HTTP/1.1" 400' in messages(caplog, "uvicorn.access")[0]
    assert any(
        '"WebSocket /ws/stream" [accepted]' in line for line in messages(caplog, "uvicorn.error")
    )
    told = messages(caplog, "uvicorn.access") + messages(caplog, "uvicorn.error")
    assert not [line for line in told if "secret" in line]


def test_a_reply_that_is_cut_at_the_end_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(TextDelta("Hel"), sound(500), threading.Event(), DONE)
    wav = sound_file(tone(0.2))
    with (
        worker_on_loopback(engine, drain_s=0.2) as worker,
        httpx.stream("POST", f"{worker.url}/v1/speech?format=pcm", content=wav) as response,
    ):
        pieces = response.iter_raw()
        next(pieces)
        worker.http.stop()
        assert worker.ended(within_s=8)
    assert [record.exc_info for record in caplog.records if record.exc_info] == []
    assert messages(caplog, "uvicorn.error").count("a request was cut: the server ends") == 1


def test_a_second_signal_leaves_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with worker_on_loopback(FakeEngine()) as worker:
        httpx.get(f"{worker.url}/health")
        worker.http.force_exit = worker.http.should_exit = True
        assert worker.ended(within_s=8)
    assert "Traceback" not in caplog.text


@pytest.fixture(autouse=True)
def at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
