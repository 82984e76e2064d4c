import asyncio
import io
import json
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from fake_engine import DONE, RATE_HZ, FakeEngine, serving, sound
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from omnispeech.engine.events import TextDelta
from omnispeech.errors import GenerationError, NotReady, Overloaded
from omnispeech.server.window import RollingWindow

TRIGGER = json.dumps({"type": "trigger_response", "timestamp": 12.5})
SPEECH = np.arange(1600, dtype="<i2")


@asynccontextmanager
async def talking(engine: FakeEngine, query: str = "?events=1") -> AsyncIterator[ClientConnection]:
    with serving(engine) as url:
        address = url.replace("http", "ws") + "/ws/stream" + query
        async with connect(address, max_size=None) as socket:
            yield socket


async def received(socket: ClientConnection) -> Any:
    message = await asyncio.wait_for(socket.recv(), 3)
    return json.loads(message) if isinstance(message, str) else message


async def until_end(socket: ClientConnection) -> list[Any]:
    got = [await received(socket)]
    while isinstance(got[-1], bytes) or got[-1]["type"] not in ("end", "error"):
        got.append(await received(socket))
    return got


def heard(engine: FakeEngine, turn: int = -1) -> list[int]:
    (message,) = engine.requests[turn].messages
    return (message.content[0].samples * 32768).astype(int).tolist()


def samples_of(frame: bytes) -> list[int]:
    (length,) = struct.unpack_from("<I", frame)
    assert length == len(frame) - 4
    samples, rate_hz = soundfile.read(io.BytesIO(frame[4:]), dtype="int16")
    assert rate_hz == RATE_HZ
    return samples.tolist()


async def test_without_events_an_answer_is_only_frames_with_a_complete_wav() -> None:
    engine = FakeEngine()
    async with talking(engine, "") as socket:
        for _ in range(2):
            await socket.send(SPEECH.tobytes())
            await socket.send(TRIGGER)
            assert samples_of(await received(socket)) == list(range(500))
            assert samples_of(await received(socket)) == list(range(500, 800))
            await asyncio.sleep(0.05)


async def test_with_events_text_and_end_are_told_in_json() -> None:
    async with talking(FakeEngine()) as socket:
        await socket.send(SPEECH.tobytes())
        await socket.send(TRIGGER)
        got = await until_end(socket)
    assert [m if isinstance(m, dict) else "wav" for m in got[:-1]] == [
        {"type": "text", "text": "Hel"},
        "wav",
        {"type": "text", "text": "lo"},
        "wav",
    ]
    assert got[-1]["type"] == "end"
    assert got[-1]["finish"] == {"text": "stop", "speech": "length"}
    assert got[-1]["timings"]["first_audio_s"] == 0.2


async def test_f1_the_window_is_heard_as_one_audio_item_of_the_user() -> None:
    engine = FakeEngine()
    async with talking(engine) as socket:
        await socket.send(SPEECH[:1000].tobytes())
        await socket.send(SPEECH[1000:].tobytes())
        await socket.send(TRIGGER)
        await until_end(socket)
    assert heard(engine) == SPEECH.tolist()
    got = engine.requests[0]
    assert (got.messages[0].role, len(got.messages)) == ("user", 1)
    assert (got.temperature, got.top_p, got.max_new_tokens) == (1.0, 1.0, 256)


async def test_f2_audio_sent_during_an_answer_belongs_to_the_next_turn() -> None:
    gate = threading.Event()
    engine = FakeEngine(TextDelta("a"), gate, DONE)
    async with talking(engine) as socket:
        await socket.send(SPEECH[:100].tobytes())
        await socket.send(TRIGGER)
        await received(socket)
        await socket.send(SPEECH[100:300].tobytes())
        await socket.send(TRIGGER)  # during an answer: ignored
        await socket.send("bad")  # answered at once: the two before it have been read
        assert (await received(socket))["type"] == "error"
        gate.set()
        assert [m["type"] for m in await until_end(socket)] == ["end"]
        assert len(engine.requests) == 1
        await socket.send(TRIGGER)
        await until_end(socket)
    assert heard(engine, 0) == SPEECH[:100].tolist()
    assert heard(engine, 1) == SPEECH[100:300].tolist()


async def test_f2_pings_and_other_callers_are_served_during_an_answer() -> None:
    gate = threading.Event()
    async with talking(FakeEngine(TextDelta("a"), gate, DONE)) as socket:
        await socket.send(SPEECH.tobytes())
        await socket.send(TRIGGER)
        await received(socket)
        await asyncio.wait_for(await socket.ping(), 2)
        async with httpx.AsyncClient(timeout=2) as other:
            port = socket.remote_address[1]
            assert (await other.get(f"http://127.0.0.1:{port}/health")).status_code == 200
        gate.set()
        await until_end(socket)


async def test_f3_the_next_turn_does_not_contain_the_old_one() -> None:
    engine = FakeEngine()
    async with talking(engine) as socket:
        for part in (SPEECH[:700], SPEECH[700:]):
            await socket.send(part.tobytes())
            await socket.send(TRIGGER)
            await until_end(socket)
    assert heard(engine, 0) == SPEECH[:700].tolist()
    assert heard(engine, 1) == SPEECH[700:].tolist()


async def test_f3_a_chunk_longer_than_the_window_keeps_its_last_30_seconds() -> None:
    engine = FakeEngine()
    numbers = np.arange(31 * 16_000).astype("<i2")
    async with talking(engine) as socket:
        await socket.send(numbers.tobytes())
        await socket.send(TRIGGER)
        await until_end(socket)
    assert heard(engine) == numbers[16_000:].tolist()


BAD_MESSAGES = [
    (b"\0\0\0", "3 bytes are not whole samples"),
    (TRIGGER, "there is no audio since the last turn"),
    ("{", "the body is not valid JSON"),
    ("[]", "the body=[]: input should be an object"),
    ("{}", "type is missing; send it"),
    ('{"type": "dance"}', "unknown message type 'dance'; known: trigger_response"),
]


@pytest.mark.parametrize(("message", "reason"), BAD_MESSAGES)
async def test_f3_a_wrong_message_is_told_and_the_connection_stays_open(
    message: bytes | str, reason: str
) -> None:
    async with talking(FakeEngine()) as socket:
        await socket.send(message)
        error = await received(socket)
        assert (error["type"], error["error"]) == ("error", "RequestError")
        assert error["message"].startswith(reason)
        await socket.send(SPEECH.tobytes())
        await socket.send(TRIGGER)
        assert (await until_end(socket))[-1]["type"] == "end"


async def test_wrong_messages_are_ignored_without_events() -> None:
    async with talking(FakeEngine(), "") as socket:
        for message, _ in BAD_MESSAGES:
            await socket.send(message)
        await socket.send(SPEECH.tobytes())
        await socket.send(TRIGGER)
        assert isinstance(await received(socket), bytes)


@pytest.mark.parametrize(
    ("error", "name", "message"),
    [
        (Overloaded("full"), "Overloaded", "full"),
        (NotReady("wait"), "NotReady", "wait"),
        (GenerationError("device"), "GenerationError", "device"),
        (KeyError("secret"), "GenerationError", "the server failed; its log has the reason"),
    ],
)
async def test_f4_a_failed_answer_is_told_and_the_talk_goes_on(
    error: Exception, name: str, message: str
) -> None:
    engine = FakeEngine(error)
    async with talking(engine) as socket:
        await socket.send(SPEECH.tobytes())
        await socket.send(TRIGGER)
        assert await received(socket) == {"type": "error", "error": name, "message": message}
        engine.steps = (DONE,)
        await socket.send(SPEECH.tobytes())
        await socket.send(TRIGGER)
        assert (await received(socket))["type"] == "end"


@pytest.mark.parametrize("error", [Overloaded("full"), NotReady("wait")])
async def test_a_question_refused_for_now_can_be_asked_again(error: Exception) -> None:
    engine = FakeEngine(error)
    async with talking(engine) as socket:
        await socket.send(SPEECH[:700].tobytes())
        await socket.send(TRIGGER)
        assert (await received(socket))["type"] == "error"
        engine.steps = (DONE,)
        await socket.send(SPEECH[700:].tobytes())
        await socket.send(TRIGGER)
        assert (await received(socket))["type"] == "end"
        await socket.send(TRIGGER)
        assert "there is no audio" in (await received(socket))["message"]
    assert heard(engine) == SPEECH.tolist()


@pytest.mark.parametrize("query", ["", "?events=1"])
async def test_f4_leaving_during_an_answer_cancels_it(
    query: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(sound(500), threading.Event())
    async with talking(engine, query) as socket:
        await socket.send(SPEECH.tobytes())
        await socket.send(TRIGGER)
        await received(socket)
        await socket.close()
        assert await asyncio.to_thread(engine.cancelled.wait, 2)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_c2_a_connection_that_breaks_during_an_answer_cancels_it() -> None:
    engine = FakeEngine(sound(500), threading.Event())
    async with talking(engine) as socket:
        await socket.send(SPEECH.tobytes())
        await socket.send(TRIGGER)
        await received(socket)
        socket.transport.abort()
        assert await asyncio.to_thread(engine.cancelled.wait, 2)


async def test_b1_a_block_is_sent_before_the_answer_is_whole() -> None:
    gate = threading.Event()
    async with talking(FakeEngine(sound(500), gate, DONE), "") as socket:
        await socket.send(SPEECH.tobytes())
        await socket.send(TRIGGER)
        assert samples_of(await received(socket)) == list(range(500))
        gate.set()


async def test_a_trigger_right_after_the_end_starts_the_next_answer() -> None:
    engine = FakeEngine(DONE)
    async with talking(engine) as socket:
        for _ in range(20):
            await socket.send(SPEECH.tobytes())
            await socket.send(TRIGGER)
            assert (await received(socket))["type"] == "end"
    assert len(engine.requests) == 20


def test_f3_a_window_that_was_given_out_does_not_change() -> None:
    window = RollingWindow()
    window.append(SPEECH.tobytes())
    before = window.last(0.05)
    kept = before.copy()
    window.append(bytes(2 * 480_000))
    np.testing.assert_array_equal(before, kept)
    assert window.seconds == 30
    assert not window.take().any() and window.seconds == 0


def test_f4_full_scale_is_one_and_no_sample_is_clipped() -> None:
    window = RollingWindow()
    window.append(np.array([-32768, 32767, 1], "<i2").tobytes())
    assert window.take().tolist() == [-1.0, 32767 / 32768, 1 / 32768]


def test_what_is_put_back_stands_before_what_came_since_and_is_the_first_to_fall_out() -> None:
    window = RollingWindow()
    window.append(SPEECH[:2].tobytes())
    taken = window.take()
    window.append(SPEECH[2:4].tobytes())
    window.put_back(taken)
    assert (window.last(1.0) * 32768).astype(int).tolist() == [0, 1, 2, 3]
    taken = window.take()
    window.append(bytes(2 * 480_000))
    window.put_back(taken)
    assert window.seconds == 30 and not window.last(30).any()


async def test_a_wrong_path_is_refused_with_403() -> None:
    with serving(FakeEngine()) as url, pytest.raises(InvalidStatus, match="403"):
        async with connect(url.replace("http", "ws") + "/ws/nothing"):
            pass


async def test_a_frame_over_the_limit_ends_the_connection() -> None:
    async with talking(FakeEngine()) as socket:
        await socket.send(bytes(24_000_002))
        with pytest.raises(ConnectionClosed):
            await received(socket)
    assert socket.close_code == 1009
