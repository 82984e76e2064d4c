"""What one request, one connection and all connections together may cost."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import websockets
from access_keys import ALICE, key_file, whole_server
from fake_engine import DONE, FakeEngine, serving, sound, sound_file, tone
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from websockets.asyncio.client import connect

from omnispeech.config import AccessConfig, TalkConfig
from omnispeech.errors import TooLarge
from omnispeech.server import connections
from omnispeech.server.limits import BodyLimit

WAV = sound_file(tone(0.2))
HEAD = b"POST /v1/speech HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n"


async def said(reader: asyncio.StreamReader) -> tuple[int, str, str]:
    """Status, headers and body of one answer; the server closes after it."""
    text = (await asyncio.wait_for(reader.read(), 10)).decode()
    head, _, body = text.partition("\r\n\r\n")
    return int(head.split()[1]), head.lower(), body


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


# ---- bodies


async def test_a_body_that_never_ends_is_408() -> None:
    engine = FakeEngine()
    with serving(engine, access=AccessConfig(upload_s=1.0)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
        writer.write(HEAD + b"Connection: close\r\n\r\n" + bytes(10))
        status, _, body = await said(reader)
        writer.close()
    assert status == 408 and engine.requests == []
    error = json.loads(body)["error"]
    assert error["type"] == "RequestTimeout" and "not whole after 1 s" in error["message"]


async def test_a_body_that_drips_is_408_however_often_it_does() -> None:
    with serving(FakeEngine(), access=AccessConfig(upload_s=1.0)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
        writer.write(HEAD + b"Connection: close\r\n\r\n")
        answer = asyncio.create_task(said(reader))
        for _ in range(40):
            writer.write(b"x")
            await asyncio.sleep(0.05)
        status, _, _ = await answer
        writer.close()
    assert status == 408


async def through_limit(app: ASGIApp, *pieces: bytes | float, upload_s: float) -> list[Message]:
    """What is sent back for a body in `pieces`; a number: seconds of silence."""
    coming = iter(pieces)
    sent: list[Message] = []

    async def receive() -> Message:
        for piece in coming:
            if isinstance(piece, bytes):
                return {"type": "http.request", "body": piece, "more_body": True}
            await asyncio.sleep(piece)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    limited = BodyLimit(app, max_mb=1, upload_s=upload_s)
    await limited({"type": "http", "path": "/", "headers": []}, receive, send)
    return sent


async def reads_badly(scope: Scope, receive: Receive, send: Send) -> None:
    """As frameworks do: what goes wrong with a body is a status of their own."""
    try:
        while (await receive())["more_body"]:
            pass
        status = 200
    except Exception:
        status = 400
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"whatever"})


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ((b"a", b"b"), 200),
        ((b"a", 5.0), 408),
        ((0.1, b"a", 0.1, b"b", 0.1), 408),  # each comes in time
        ((bytes(600_000), bytes(600_000)), 413),
    ],
)
async def test_the_reason_is_told_whatever_the_route_makes_of_it(
    pieces: tuple[bytes | float, ...], status: int
) -> None:
    sent = await through_limit(reads_badly, *pieces, upload_s=0.2)
    assert [message.get("status") for message in sent] == [status, None]
    assert (b"whatever" in sent[1]["body"]) == (status == 200)


async def test_a_caller_may_wait_longer_for_the_reply_than_the_question_may_take() -> None:
    coming = iter(({"type": "http.request", "more_body": False}, {"type": "http.disconnect"}))

    async def receive() -> Message:
        message = next(coming)
        if message["type"] == "http.disconnect":
            await asyncio.sleep(0.2)
        return message

    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    limited = BodyLimit(waits, max_mb=1, upload_s=0.05)
    await limited({"type": "http", "path": "/", "headers": []}, receive, unsent)


async def unsent(message: Message) -> None:
    raise AssertionError(message)


async def test_an_answer_that_has_begun_is_not_followed_by_another() -> None:
    async def answers_first(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with suppress(TooLarge):
            while (await receive())["more_body"]:
                pass
        await send({"type": "http.response.body", "body": b"whatever"})

    sent = await through_limit(answers_first, bytes(600_000), bytes(600_000), upload_s=5.0)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


async def test_clients_of_openai_are_told_in_their_own_shape() -> None:
    with serving(FakeEngine(), max_body_mb=1) as url:
        async with httpx.AsyncClient() as client:
            answer = await client.post(f"{url}/v1/chat/completions", content=bytes(1_000_001))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


# ---- frames


async def test_a_frame_over_the_limit_closes_the_connection() -> None:
    with serving(FakeEngine(), talk=TalkConfig(max_frame_mb=1)) as url:
        async with connect(url.replace("http", "ws", 1) + "/ws/stream") as socket:
            await socket.send(bytes(1_000_000))
            await socket.send(bytes(1_000_002))
            with pytest.raises(websockets.ConnectionClosed) as raised:
                await socket.recv()
    assert raised.value.rcvd is not None and raised.value.rcvd.code == 1009


# ---- connections


@pytest.fixture
async def few(tmp_path: Path) -> AsyncIterator[int]:
    """The port of a server with room for two connections and one that is told no."""
    access = AccessConfig(max_connections=2, api_keys=str(key_file(tmp_path, alice=ALICE)))
    with whole_server(access) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await asyncio.sleep(0.05)
        yield port
        for _, writer in held:
            writer.close()


async def asked(port: int, path: str, *fields: str) -> tuple[int, str, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (f"GET {path} HTTP/1.1", "Host: 127.0.0.1", *fields, "", "")
    writer.write("\r\n".join(head).encode())
    try:
        return await said(reader)
    finally:
        writer.close()


async def test_one_connection_too_many_is_503_and_closed(few: int) -> None:
    status, head, body = await asked(few, "/v1/speech/x")
    assert status == 503 and "retry-after: 1" in head and "connection: close" in head
    error = json.loads(body)["error"]
    assert error["type"] == "Overloaded" and "2 connections are open" in error["message"]


async def test_who_has_sent_a_body_reads_why_nobody_listens(few: int) -> None:
    body = bytes(1_000_000)
    head = b"POST /v1/speech HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"
    for _ in range(5):  # a reset may come late
        reader, writer = await asyncio.open_connection("127.0.0.1", few)
        writer.write(head + body)
        assert (await said(reader))[0] == 503
        writer.close()


async def test_of_a_crowd_as_many_as_there_is_room_for_are_answered() -> None:
    with whole_server(AccessConfig(max_connections=5)) as port:
        come = [await asyncio.open_connection("127.0.0.1", port) for _ in range(9)]
        await asyncio.sleep(0.05)
        for _, writer in come:
            writer.write(b"GET /v1/speech/x HTTP/1.1\r\nHost: a\r\n\r\n")
        lines = [await asyncio.wait_for(reader.readline(), 10) for reader, _ in come]
        for _, writer in come:
            writer.close()
    assert sorted(int(line.split()[1]) for line in lines) == [404] * 5 + [503] * 4


async def test_connections_too_many_are_counted() -> None:
    with whole_server(AccessConfig(max_connections=1)) as port:
        _, held = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.05)
        assert (await asked(port, "/v1/speech/x"))[0] == 503
        held.close()
        await asyncio.sleep(0.05)
        _, _, metrics = await asked(port, "/metrics", "Connection: close")
    assert 'omnispeech_requests_total{route="none",status="503"} 1.0' in metrics


async def test_as_many_as_there_may_be_are_answered() -> None:
    with whole_server(AccessConfig(max_connections=1)) as port:
        status, _, _ = await asked(port, "/v1/speech/x", "Connection: close")
    assert status == 404


async def test_probes_are_answered_in_the_thickest_crowd(few: int) -> None:
    status, _, _ = await asked(few, "/health", "Connection: close")
    assert status == 200


async def test_a_talk_too_many_is_closed_with_1013(few: int) -> None:
    async with connect(f"ws://127.0.0.1:{few}/ws/stream") as socket:
        with pytest.raises(websockets.ConnectionClosed) as raised:
            await socket.recv()
    assert raised.value.rcvd is not None and raised.value.rcvd.code == 1013
    assert "2 connections are open" in raised.value.rcvd.reason


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADERS_S", 0.1)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("head", [b"", b"GET /health HT", HEAD])
async def test_a_head_that_does_not_come_ends_the_connection(head: bytes) -> None:
    with whole_server(AccessConfig()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET /",
        b"GET /health HTTP/1.1\r\nA: ",
        b"POST /ready HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nA: ",
    ],
)
async def test_a_head_without_end_ends_the_connection_at_once(beginning: bytes) -> None:
    with whole_server(AccessConfig()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(beginning)
        with pytest.raises(ConnectionError):
            for _ in range(100):
                writer.write(b"a" * 65_536)
                await writer.drain()
                await asyncio.sleep(0.005)
        writer.close()


@pytest.mark.usefixtures("impatient")
async def test_a_second_head_that_does_not_come_ends_it_too() -> None:
    with whole_server(AccessConfig()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b"model_worker")
        writer.write(b"GET /health HT")
        assert await asyncio.wait_for(reader.read(), 4) == b'"}'
        writer.close()


@pytest.mark.usefixtures("impatient")
async def test_who_is_being_answered_or_talks_is_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with whole_server(AccessConfig()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + b"Connection: close\r\n\r\n")
        async with connect(f"ws://127.0.0.1:{port}/ws/stream?events=1") as socket:
            await asyncio.sleep(0.5)
            await socket.send("{}")
            assert "error" in await socket.recv()
        writer.write(bytes(1000))
        status, _, _ = await said(reader)
        writer.close()
    assert status == 400  # 1000 zeros are no sound


# ---- callers that do not read


MUCH = tuple(sound(24_000) for _ in range(600))  # 29 MB: more than sockets keep
TRIGGERS = {
    "/ws/stream": [bytes(3200), json.dumps({"type": "trigger_response"})],
    "/v1/realtime": [
        json.dumps(
            {
                "type": "conversation.item.create",
                "item": {
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "hello"}],
                },
            }
        ),
        json.dumps({"type": "response.create"}),
    ],
}


def small_socket(port: int) -> socket.socket:
    """Takes no more than a few kB that nobody reads."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.connect(("127.0.0.1", port))
    return one


SPEAK = HEAD.replace(b"/v1/speech", b"/v1/speech?format=pcm").replace(b"1000", b"%d" % len(WAV))


def test_who_reads_nothing_of_a_reply_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(*MUCH, threading.Event(), DONE)
    with (
        caplog.at_level(logging.INFO),
        whole_server(AccessConfig(stalled_s=1.0), engine) as port,
        small_socket(port) as caller,
    ):
        caller.sendall(SPEAK + b"\r\n" + WAV)
        assert engine.cancelled.wait(10)
    assert "took nothing of its reply for 1 s" in caplog.text and "Traceback" not in caplog.text


def test_who_reads_slowly_gets_the_whole_reply() -> None:
    engine = FakeEngine(*MUCH[:100], DONE)  # 4.8 MB
    with whole_server(AccessConfig(stalled_s=1.0), engine) as port, small_socket(port) as caller:
        caller.sendall(SPEAK + b"Connection: close\r\n\r\n" + WAV)
        got, begun_s = 0, time.monotonic()
        while piece := caller.recv(40_000):
            got += len(piece)
            if time.monotonic() - begun_s < 3:
                time.sleep(0.03)
    assert got > 100 * 48_000 and not engine.cancelled.is_set()


@pytest.mark.parametrize("path", sorted(TRIGGERS))
async def test_a_talk_that_reads_nothing_loses_its_connection(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO),
        whole_server(AccessConfig(stalled_s=1.0), FakeEngine(*MUCH, DONE)) as port,
        small_socket(port) as caller,
    ):
        address = f"ws://127.0.0.1:{port}{path}"
        async with connect(address, sock=caller, max_queue=1, ping_interval=None) as client:
            for message in TRIGGERS[path]:
                await client.send(message)
            for _ in range(100):
                if "took nothing of its reply for 1 s" in caplog.text:
                    break
                await asyncio.sleep(0.1)
            else:
                raise AssertionError("its connection stays")
            client.transport.abort()
