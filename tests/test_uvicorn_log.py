"""What the log of a server does not hold: a line for each probe, a traceback for each cut reply."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from controller_server import worker_on_loopback
from fake_engine import DONE, FakeEngine

from omnispeech.engine.events import EngineStatus, TextDelta

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@contextmanager
def listening(caplog: pytest.LogCaptureFixture, name: str) -> Iterator[None]:
    """uvicorn hands its records to no logger above its own."""
    logger = logging.getLogger(name)
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("ready", [True, False])
def test_probes_leave_no_line_and_other_requests_do(
    ready: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(status=EngineStatus(ready=ready))
    with (
        worker_on_loopback(engine) as worker,
        listening(caplog, "uvicorn.access"),
        httpx.Client(base_url=worker.url) as client,
    ):
        for path in ("/health", "/ready?from=probe", "/metrics"):
            for method in ("GET", "HEAD"):
                client.request(method, path)
        client.post("/health")
        client.get("/healthy")
        client.post("/worker_get_status")
    told = [record.getMessage().partition('"')[2] for record in caplog.records]
    assert told == [
        'POST /health HTTP/1.1" 405',
        'GET /healthy HTTP/1.1" 404',
        'POST /worker_get_status HTTP/1.1" 200',
    ]


def test_a_reply_that_is_cut_at_the_end_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(TextDelta("Hel"), threading.Event(), DONE)
    with (
        worker_on_loopback(engine, drain_s=0.2) as worker,
        listening(caplog, "uvicorn.error"),
        httpx.stream("POST", f"{worker.url}/worker_generate_stream", json=HELLO) as response,
    ):
        pieces = response.iter_raw()
        next(pieces)
        worker.http.stop()
        assert worker.ended(within_s=8)
    assert [record.exc_info for record in caplog.records if record.exc_info] == []
    cut = "a request was cut: the server ends"
    assert [record.getMessage() for record in caplog.records].count(cut) == 1
