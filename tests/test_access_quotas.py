"""What one key may ask for: requests and sound by the minute, conversations at once."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import websockets
from access_keys import ALICE, BOB, app_behind, ask, bearer, key_file
from fake_engine import DONE, RATE_HZ, FakeEngine, serving, sound, sound_file, tone
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection, connect

from omnispeech.config import AccessConfig
from omnispeech.engine.events import Audio, Message, Text, TextDelta, TurnRequest
from omnispeech.errors import Overloaded, TooManyRequests, Unauthorized
from omnispeech.server.access.callers import CALLER, Caller
from omnispeech.server.access.keys import LOOK_S
from omnispeech.server.access.quotas import Account, Bucket, Limits
from omnispeech.server.admission import Admission
from omnispeech.server.reply_record import ReplyRecord

WAV = sound_file(tone(1.0))


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def account(clock: Clock, **limits: Any) -> Account:
    return Account("alice", Limits(**limits), clock)


def requests_now(limited: Account, most: int = 100) -> int:
    """How many are let in at this moment."""
    for number in range(most):
        try:
            limited.take_request()
        except TooManyRequests:
            return number
    return most


# ---- by the minute


def test_a_minutes_worth_is_there_at_once_and_comes_again_at_its_pace() -> None:
    clock = Clock()
    limited = account(clock, requests_per_minute=6)
    assert requests_now(limited) == 6
    clock.now_s += 9.9
    assert requests_now(limited) == 0
    clock.now_s += 0.2
    assert requests_now(limited) == 1
    clock.now_s += 3600
    assert requests_now(limited) == 6  # and no more


@given(per_minute=st.integers(1, 600), used=st.integers(0, 1200), steps=st.lists(st.floats(0, 90)))
def test_after_the_time_that_is_told_it_works_and_before_it_does_not(
    per_minute: int, used: int, steps: list[float]
) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    bucket.take(used)
    for step in steps:
        clock.now_s += step
    wait_s = bucket.wait_s()
    if wait_s > 1e-6:
        clock.now_s += 0.999 * wait_s
        assert bucket.wait_s() > 0
        clock.now_s += 0.001 * wait_s + 1e-6
    assert bucket.wait_s() == 0


def test_the_refusal_names_the_key_the_limit_and_the_whole_seconds() -> None:
    clock = Clock()
    limited = account(clock, requests_per_minute=7)
    requests_now(limited)
    with pytest.raises(TooManyRequests, match="'alice' has used up its 7 requests per") as raised:
        limited.take_request()
    assert raised.value.retry_after_s == 9  # 60 / 7 = 8.57
    clock.now_s += 9
    limited.take_request()


def test_sound_is_taken_when_it_is_known_and_may_be_owed() -> None:
    clock = Clock()
    limited = account(clock, audio_seconds_per_minute=60)
    limited.take_request()
    limited.take_audio(90)
    with pytest.raises(TooManyRequests, match="60 seconds of sound per minute") as raised:
        limited.take_request()
    assert raised.value.retry_after_s == 31
    clock.now_s += 31
    limited.take_request()


def test_a_refused_request_costs_nothing() -> None:
    clock = Clock()
    limited = account(clock, requests_per_minute=2, audio_seconds_per_minute=1)
    limited.take_audio(1)
    for _ in range(5):
        with pytest.raises(TooManyRequests):
            limited.take_request()
    clock.now_s += 60
    assert requests_now(limited) == 2


def test_new_limits_count_from_now_and_the_same_ones_go_on() -> None:
    clock = Clock()
    limited = account(clock, requests_per_minute=3)
    requests_now(limited)
    limited.set_limits(Limits(requests_per_minute=3))
    assert requests_now(limited) == 0
    limited.set_limits(Limits(requests_per_minute=5))
    assert requests_now(limited) == 5


def test_without_limits_there_is_no_end() -> None:
    assert requests_now(Account("anybody"), 1000) == 1000


def test_a_key_that_was_taken_away_begins_no_reply() -> None:
    gone = Account("alice")
    gone.revoked = True
    with pytest.raises(Unauthorized, match="'alice' was taken away"):
        Caller(gone, live=True).check()


# ---- conversations at once


def test_a_place_is_free_again_however_the_conversation_ended() -> None:
    caller = Caller(account(Clock(), conversations=1))
    with pytest.raises(KeyError), caller.talk():
        with pytest.raises(TooManyRequests, match="1 of its 1 conversations at once"):
            caller.talk().__enter__()
        raise KeyError
    with caller.talk():
        assert caller.account.conversations == 1
    assert caller.account.conversations == 0


def test_a_reply_of_a_talk_has_the_place_of_the_talk() -> None:
    limited = account(Clock(), conversations=1)
    live = Caller(limited, live=True)
    with live.talk(), live.reply(), pytest.raises(TooManyRequests):
        Caller(limited).reply().__enter__()
    assert limited.conversations == 0


def test_places_of_many_threads_are_counted() -> None:
    limited = account(Clock(), conversations=1_000_000)

    def come_and_go() -> None:
        for _ in range(2000):
            limited.take_conversation()
            limited.end_conversation()

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert limited.conversations == 0


# ---- what is charged


def spoken(seconds: float, role: str = "user") -> Message:
    return Message(role, (Text("?"), Audio(np.zeros(int(seconds * 16_000), np.float32))))


SAID = Message("assistant", (Text("yes"),))
TALK = (spoken(2), SAID, spoken(1), spoken(3))
LONG_TALK = (spoken(2), SAID, spoken(5), SAID, spoken(1))


@pytest.mark.parametrize(
    ("live", "messages", "seconds"),
    [
        (False, TALK, 16),
        (True, TALK, 14),
        (True, TALK[:1], 12),
        (True, TALK[:2], 10),
        (True, LONG_TALK, 11),
    ],
)
def test_what_was_sent_is_charged_and_a_talk_sends_its_history_once(
    live: bool, messages: tuple[Message, ...], seconds: float
) -> None:
    clock = Clock()
    limited = account(clock, audio_seconds_per_minute=60)
    Caller(limited, live).charge(messages, 10.0)
    limited.take_audio(60 - seconds)
    with pytest.raises(TooManyRequests) as raised:
        limited.take_request()
    assert raised.value.retry_after_s == 1


@contextmanager
def called_by(caller: Caller) -> Iterator[None]:
    token = CALLER.set(caller)
    try:
        yield
    finally:
        CALLER.reset(token)


class Charged(Account):
    def __init__(self) -> None:
        super().__init__("alice")
        self.audio_s: list[float] = []

    def take_audio(self, seconds: float) -> None:
        self.audio_s.append(seconds)


async def charged(*steps: Any, pieces: int = 100, fate: str = "") -> list[float]:
    """Seconds that a reply to 2 s of sound costs. pieces: events taken before the caller leaves."""
    admission = Admission(FakeEngine(*steps), on_end=lambda record: None)
    caller = Caller(Charged())
    request = TurnRequest(messages=(spoken(2),))
    with called_by(caller):
        guess = admission.guess(request) if fate else None
        events = guess.events if guess else admission.answer(request)
    try:
        async for _ in events:
            pieces -= 1
            if not pieces:
                break
    except Overloaded:
        pass
    finally:
        await events.aclose()
    if guess:
        guess.commit() if fate == "commit" else guess.throw_away()
    assert isinstance(caller.account, Charged)
    return caller.account.audio_s


async def test_a_reply_costs_its_sound_and_that_of_its_question() -> None:
    assert await charged(sound(RATE_HZ), sound(RATE_HZ), DONE) == [4.0]


async def test_a_reply_that_is_left_costs_what_was_made_of_it() -> None:
    assert await charged(sound(RATE_HZ), sound(RATE_HZ), DONE, pieces=1) == [3.0]


async def test_a_refused_reply_costs_no_sound() -> None:
    assert await charged(Overloaded("full")) == []


async def test_a_guess_costs_sound_only_if_it_was_right() -> None:
    assert await charged(sound(RATE_HZ), DONE, fate="commit") == [3.0]
    assert await charged(sound(RATE_HZ), DONE, fate="throw away") == []


def test_a_record_remembers_who_asked() -> None:
    caller = Caller(Account("alice"))
    with called_by(caller):
        record = ReplyRecord(request=TurnRequest(messages=TALK), begun_s=0, asked_s=0)
    assert record.caller is caller and CALLER.get().name == "anybody"


# ---- over the wire


async def post(app: FastAPI, key: str) -> httpx.Response:
    return await ask(app, "/v1/speech", "POST", bearer(key), content=WAV)


async def test_used_up_requests_are_429_for_this_key_alone(tmp_path: Path) -> None:
    path = key_file(tmp_path, "requests_per_minute = 2", bob=BOB, alice=ALICE)
    app = app_behind(path)
    assert [(await post(app, ALICE)).status_code for _ in range(3)] == [200, 200, 429]
    refused = await post(app, ALICE)
    assert int(refused.headers["retry-after"]) in (29, 30)
    assert refused.json()["error"]["type"] == "TooManyRequests"
    assert "'alice' has used up its 2 requests per minute" in refused.json()["error"]["message"]
    assert (await post(app, BOB)).status_code == 200
    assert (await ask(app, "/v1/speech/x", headers=bearer(ALICE))).status_code == 404  # no reply


def bodiless(path: str) -> bytes:
    """The head of a request whose body never comes."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Length: 1000000"]
    return "\r\n".join([*lines, f"Authorization: Bearer {ALICE}", "", ""]).encode()


@pytest.mark.parametrize("path", ["/v1/speech", "/v1/chat/completions", "/worker_generate_stream"])
async def test_a_used_up_key_is_told_before_its_body_is_read(path: str, tmp_path: Path) -> None:
    limits = key_file(tmp_path, "requests_per_minute = 1", alice=ALICE)
    with serving(FakeEngine(*WHOLE), access=AccessConfig(api_keys=str(limits))) as url:
        async with httpx.AsyncClient() as client:
            answer = await client.post(f"{url}/v1/speech", headers=bearer(ALICE), content=WAV)
        assert answer.status_code == 200
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(bodiless(path))
        told = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode().lower()
        writer.close()
    assert told.startswith("http/1.1 429 ") and "retry-after: 60" in told


async def test_a_key_whose_places_are_taken_is_told_before_its_body_is_read(tmp_path: Path) -> None:
    limits = key_file(tmp_path, "conversations = 1", alice=ALICE)
    with serving(FakeEngine(*WHOLE), access=AccessConfig(api_keys=str(limits))) as url:
        async with realtime(url, ALICE) as socket:
            await told(socket, "session.created")
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            writer.write(bodiless("/v1/speech"))
            line = await asyncio.wait_for(reader.readline(), 5)
            writer.close()
    assert b" 429 " in line


async def test_a_used_up_key_begins_no_talk_and_comes_back_to_one_that_it_lost(
    tmp_path: Path,
) -> None:
    limits = key_file(tmp_path, "requests_per_minute = 1", alice=ALICE)
    with serving(FakeEngine(*WHOLE), access=AccessConfig(api_keys=str(limits))) as url:
        async with realtime(url, ALICE) as lost:
            session = (await told(lost, "session.created"))["session"]
            assert (await asks(lost))["response"]["status"] == "completed"
            lost.transport.abort()
        async with realtime(url, ALICE) as socket:
            with pytest.raises(websockets.ConnectionClosed) as raised:
                await socket.recv()
        assert raised.value.rcvd is not None and raised.value.rcvd.code == 1013
        address = url.replace("http", "ws", 1) + f"/v1/realtime?resume={session['id']}"
        async with connect(address, additional_headers=bearer(ALICE)) as socket:
            assert (await told(socket, "session.created"))["session"]["id"] == session["id"]


def test_to_look_costs_nothing() -> None:
    account = Account("alice", Limits(requests_per_minute=1, conversations=1))
    for _ in range(3):
        account.peek()
    account.take_conversation()
    account.take_request()


async def test_used_up_sound_is_429(tmp_path: Path) -> None:
    path = key_file(tmp_path, "audio_seconds_per_minute = 1.5", alice=ALICE)
    app = app_behind(path)
    assert (await post(app, ALICE)).status_code == 200
    refused = await post(app, ALICE)
    assert refused.status_code == 429 and "1.5 seconds of sound" in refused.text


async def test_one_reply_too_many_at_once_is_429_until_another_ends(tmp_path: Path) -> None:
    go_on = threading.Event()
    engine = FakeEngine(sound(5), go_on, DONE)
    app = app_behind(key_file(tmp_path, "conversations = 1", alice=ALICE), engine)
    first = asyncio.create_task(post(app, ALICE))
    while not engine.requests:
        await asyncio.sleep(0.001)
    refused = await post(app, ALICE)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    go_on.set()
    assert (await first).status_code == 200
    assert (await post(app, ALICE)).status_code == 200


async def test_a_reply_that_found_no_place_is_no_request(tmp_path: Path) -> None:
    go_on = threading.Event()
    engine = FakeEngine(sound(5), go_on, DONE)
    limits = "conversations = 1\nrequests_per_minute = 2"
    app = app_behind(key_file(tmp_path, limits, alice=ALICE), engine)
    first = asyncio.create_task(post(app, ALICE))
    while not engine.requests:
        await asyncio.sleep(0.001)
    for _ in range(3):
        assert "conversations at once" in (await post(app, ALICE)).text
    go_on.set()
    assert (await first).status_code == 200
    assert (await post(app, ALICE)).status_code == 200


async def test_one_talk_too_many_is_closed_with_1013_and_a_lost_one_leaves_its_place(
    tmp_path: Path,
) -> None:
    path = key_file(tmp_path, "conversations = 1", alice=ALICE)
    with serving(FakeEngine(), access=AccessConfig(api_keys=str(path))) as url:
        address = url.replace("http", "ws", 1) + "/ws/stream"
        async with connect(address, additional_headers=bearer(ALICE)) as first:
            async with connect(address, additional_headers=bearer(ALICE)) as second:
                with pytest.raises(websockets.ConnectionClosed) as raised:
                    await second.recv()
            assert raised.value.rcvd is not None and raised.value.rcvd.code == 1013
            assert "1 of its 1 conversations" in raised.value.rcvd.reason
            first.transport.abort()
        await taken_again(address)


async def taken_again(address: str) -> None:
    for _ in range(200):
        async with connect(address, additional_headers=bearer(ALICE)) as socket:
            try:
                await asyncio.wait_for(socket.recv(), 0.05)
            except TimeoutError:  # it was not closed: the place is ours
                return
            except websockets.ConnectionClosed:
                continue
    raise AssertionError("the place was not free again")


# ---- live conversations


WHOLE = (TextDelta("Hello"), sound(500), replace(DONE, speech_finish="stop"))


async def told(socket: ClientConnection, *kinds: str) -> dict[str, Any]:
    """The next event of one of these kinds."""
    while True:
        event: dict[str, Any] = json.loads(await asyncio.wait_for(socket.recv(), 10))
        if event["type"] in kinds:
            return event


async def asks(socket: ClientConnection, text: str = "hello") -> dict[str, Any]:
    """How the response to a written question ended, or why there is none."""
    content = [{"type": "input_text", "text": text}]
    item = {"type": "message", "role": "user", "content": content}
    await socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
    await socket.send(json.dumps({"type": "response.create"}))
    return await told(socket, "response.done", "error")


def realtime(url: str, key: str) -> Any:
    address = url.replace("http", "ws", 1) + "/v1/realtime"
    return connect(address, additional_headers=bearer(key))


async def test_a_live_conversation_and_a_reply_share_the_places_of_a_key(tmp_path: Path) -> None:
    path = key_file(tmp_path, "conversations = 1", bob=BOB, alice=ALICE)
    with serving(FakeEngine(*WHOLE), access=AccessConfig(api_keys=str(path))) as url:
        async with realtime(url, ALICE) as first, httpx.AsyncClient() as client:
            await told(first, "session.created")
            async with realtime(url, ALICE) as second:
                with pytest.raises(websockets.ConnectionClosed) as raised:
                    await second.recv()
            assert raised.value.rcvd is not None and raised.value.rcvd.code == 1013
            answer = await client.post(f"{url}/v1/speech", headers=bearer(ALICE), content=WAV)
            assert answer.status_code == 429
            answer = await client.post(f"{url}/v1/speech", headers=bearer(BOB), content=WAV)
            assert answer.status_code == 200
            assert (await asks(first))["response"]["status"] == "completed"


async def test_each_turn_of_a_talk_is_a_request_and_the_refused_one_leaves_the_talk_open(
    tmp_path: Path,
) -> None:
    path = key_file(tmp_path, "requests_per_minute = 1", alice=ALICE)
    with serving(FakeEngine(*WHOLE), access=AccessConfig(api_keys=str(path))) as url:
        async with realtime(url, ALICE) as socket:
            assert (await asks(socket))["response"]["status"] == "completed"
            refused = await asks(socket)
            assert "'alice' has used up its 1 requests per minute" in json.dumps(refused)
            await socket.send(json.dumps({"type": "input_audio_buffer.clear"}))
            await told(socket, "input_audio_buffer.cleared")


async def test_the_talk_of_a_key_that_was_taken_away_gets_no_further_reply(tmp_path: Path) -> None:
    path = key_file(tmp_path, alice=ALICE, bob=BOB)
    with serving(FakeEngine(*WHOLE), access=AccessConfig(api_keys=str(path))) as url:
        async with realtime(url, ALICE) as socket:
            assert (await asks(socket))["response"]["status"] == "completed"
            key_file(tmp_path, bob=BOB)
            await asyncio.sleep(LOOK_S)
            assert "'alice' was taken away" in json.dumps(await asks(socket))
