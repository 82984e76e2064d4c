"""What a log tells, in both forms, and what stands in none: sound and text of a conversation."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from access_keys import ALICE, bearer, key_file
from controller_server import Worker, until, worker_on_loopback
from fake_engine import DONE, FakeEngine, Step, serving, sound, sound_file, tone
from websockets.sync.client import connect

from omnispeech.config import AccessConfig
from omnispeech.engine.events import TextDelta
from omnispeech.errors import GenerationError, RequestError
from omnispeech.logs import CONVERSATION, PATH, JsonLines, Level, TextLines, log_to_stdout

TESTS = Path(__file__).parent
SECRET = "Xylophone"  # what is said, asked, replied and sent wrongly
WAV = sound_file(tone(1.0))
REPLY: tuple[Step, ...] = (TextDelta(SECRET), sound(500), DONE)


class Lines(logging.Handler):
    """What a formatter makes of each record. httpx of the tests is not the server's."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith(("httpx", "httpcore", "websockets.client")):
            self.lines.append(self.format(record))


@contextmanager
def logged(*formatters: logging.Formatter, level: int = logging.INFO) -> Iterator[list[Lines]]:
    root = logging.getLogger()
    # servers of other tests, in this process, have made uvicorn silent
    loggers = [root, logging.getLogger("uvicorn.access"), logging.getLogger("uvicorn.error")]
    before = [logger.level for logger in loggers]
    handlers = [Lines(formatter) for formatter in formatters]
    for handler in handlers:
        root.addHandler(handler)
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield handlers
    finally:
        for logger, its_level in zip(loggers, before, strict=True):
            logger.setLevel(its_level)
        for handler in handlers:
            root.removeHandler(handler)


def line(formatter: logging.Formatter, message: str, **extra: Any) -> str:
    with logged(formatter) as (handler,):
        logging.getLogger("omnispeech.x").info(message, extra=extra)
    return handler.lines[0]


def test_a_line_of_text_has_time_level_and_message() -> None:
    words = line(TextLines(), "ready").split()
    assert words[2:] == ["INFO", "ready"]


def test_a_line_of_text_names_its_conversation() -> None:
    token = CONVERSATION.set("sess_1")
    try:
        assert line(TextLines(), "ready").endswith(" INFO [sess_1] ready")
    finally:
        CONVERSATION.reset(token)


def test_a_line_of_json_is_one_object() -> None:
    tokens = CONVERSATION.set("sess_1"), PATH.set("/v1/x")
    try:
        told = json.loads(line(JsonLines(), "two\nlines", fields={"audio_s": 1.5}))
    finally:
        CONVERSATION.reset(tokens[0])
        PATH.reset(tokens[1])
    assert told.pop("time").endswith("+00:00")
    assert told == {
        "level": "info",
        "logger": "omnispeech.x",
        "message": "two\nlines",
        "conversation": "sess_1",
        "path": "/v1/x",
        "audio_s": 1.5,
    }


def test_an_exception_is_a_member_of_its_line() -> None:
    with logged(JsonLines()) as (handler,):
        try:
            raise KeyError("lost")
        except KeyError:
            logging.getLogger("x").exception("failed")
    (only,) = handler.lines
    assert "\n" not in only
    assert json.loads(only)["exception"].endswith("KeyError: 'lost'")


def test_what_belongs_to_no_request_names_none() -> None:
    assert not {"conversation", "path"} & json.loads(line(JsonLines(), "ready")).keys()


@pytest.mark.parametrize(
    ("level", "shown"), [("debug", ["d", "i", "w"]), ("info", ["i", "w"]), ("warning", ["w"])]
)
def test_the_level_is_that_of_the_server_alone(
    level: Level, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, own = logging.getLogger(), logging.getLogger("omnispeech")
    before = root.handlers[:], root.level, own.level
    root.handlers.clear()
    try:
        log_to_stdout("json", level)
        for name in ("omnispeech.x", "library"):
            for number, message in ((10, "d"), (20, "i"), (30, "w")):
                logging.getLogger(name).log(number, message)
    finally:
        root.handlers[:], _, _ = before
        root.setLevel(before[1])
        own.setLevel(before[2])
    told = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [one["message"] for one in told if one["logger"] == "omnispeech.x"] == shown
    assert [one["message"] for one in told if one["logger"] == "library"] == ["i", "w"]


def test_a_reply_is_one_line_with_its_figures_and_the_id_its_caller_got() -> None:
    with logged(JsonLines()) as (handler,), worker_on_loopback(FakeEngine(*REPLY)) as worker:
        answer = httpx.post(f"{worker.url}/v1/speech", content=WAV)
        until(lambda: replies(handler))
    (told,) = replies(handler)
    assert told["conversation"] == answer.headers["x-turn-id"]
    assert told["path"] == "/v1/speech"
    assert told["outcome"] == "length"
    assert told["text_tokens"] == DONE.text_tokens
    assert told["audio_s"] == round(500 / 22_050, 3)
    assert told.keys() >= {"total_s", "first_text_s", "first_audio_s", "real_time_factor"}


def replies(handler: Lines) -> list[dict[str, Any]]:
    told = [json.loads(text) for text in handler.lines]
    return [one for one in told if one["message"].startswith("reply: ")]


def test_a_reply_names_its_key_and_never_says_it(tmp_path: Path) -> None:
    access = AccessConfig(api_keys=str(key_file(tmp_path, alice=ALICE)))
    with logged(JsonLines()) as (handler,), serving(FakeEngine(*REPLY), access=access) as url:
        httpx.post(f"{url}/v1/speech", content=WAV, headers=bearer(ALICE))
        until(lambda: replies(handler))
    assert replies(handler)[0]["key"] == "alice"
    assert ALICE not in "".join(handler.lines)


def test_all_lines_of_a_request_have_its_id_and_those_of_others_another() -> None:
    with logged(JsonLines()) as (handler,), worker_on_loopback(FakeEngine(*REPLY)) as worker:
        ids = [
            httpx.post(f"{worker.url}/v1/speech", content=WAV).headers["x-turn-id"]
            for _ in range(2)
        ]
        until(lambda: len(replies(handler)) == 2)
    told = [json.loads(text) for text in handler.lines]
    for turn_id in ids:
        own = [one["logger"] for one in told if one.get("conversation") == turn_id]
        assert own == ["uvicorn.access", "omnispeech.server.watch"]


SERVE = """
import sys
from fake_engine import FakeEngine
from omnispeech.cli import worker
from omnispeech.commands import serve

class Loaded(FakeEngine):
    def start(self, on_failure): pass
    def close(self): return True

serve.build_worker = lambda settings: Loaded()
sys.exit(worker(["--port", "0", "--log-format", "json"]))
"""


def test_every_line_of_a_server_is_an_object_from_its_start_to_its_end() -> None:
    environ = os.environ | {"OMNISPEECH_PROT": "1"}  # no setting: it is warned of
    command = [sys.executable, "-u", "-c", SERVE]
    with subprocess.Popen(
        command, cwd=TESTS, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as server:
        assert server.stdout is not None
        told = [json.loads(next(server.stdout)) for _ in range(5)]
        server.send_signal(signal.SIGTERM)
        told += [json.loads(text) for text in server.stdout]
        assert server.wait(10) == 0
    messages = [one["message"] for one in told]
    assert "OMNISPEECH_PROT is no setting" in messages[0]
    assert any(message.startswith("Uvicorn running on http://") for message in messages)


def speak(worker: Worker) -> None:
    """Over every protocol: something good, and something that is refused."""
    with httpx.Client(base_url=worker.url, timeout=10) as client:
        for form in ("wav", "pcm", "events"):
            post(client, f"/v1/speech?format={form}&system={SECRET}", content=WAV)
        post(client, f"/v1/speech?{SECRET}=1", content=WAV)
        post(client, f"/v1/speech?seed={SECRET}", content=WAV)
        post(client, "/v1/speech", content=SECRET.encode())
        message = {"role": "user", "content": SECRET}
        post(client, "/worker_generate_stream", json={"messages": [message]})
        post(client, "/worker_generate_stream", json={"messages": SECRET})
        post(client, "/worker_generate_stream", content=SECRET.encode())
        pcm = bytes(64_000)
        post(client, "/stream_infer", content=len(pcm).to_bytes(4, "little") + pcm)
        post(client, f"/stream_infer?window_s={SECRET}", content=pcm)
        chat = {"model": "omnispeech", "messages": [message]}
        for more in ({}, {"stream": True}, {"temperature": SECRET}, {SECRET: 1}):
            post(client, "/v1/chat/completions", json=chat | more)
        speech = {"model": "omnispeech", "voice": "default", "input": SECRET}
        for more in ({}, {"voice": SECRET}):
            post(client, "/v1/audio/speech", json=speech | more)
        files = {"file": ("a.wav", WAV), "model": (None, SECRET), "prompt": (None, SECRET)}
        post(client, "/v1/audio/transcriptions", files=files)
    talk(worker)
    converse(worker)


def post(client: httpx.Client, path: str, **given: Any) -> None:
    with suppress(httpx.RemoteProtocolError):  # sound has no place for an error
        client.post(path, **given)


def talk(worker: Worker) -> None:
    address = worker.url.replace("http", "ws")
    with connect(f"{address}/ws/stream?events=1&token={SECRET}") as socket:
        for text in (SECRET, json.dumps({"type": SECRET}), json.dumps({"type": [SECRET]})):
            socket.send(text)
            assert json.loads(socket.recv())["type"] == "error"
        socket.send(bytes(3200))
        socket.send(json.dumps({"type": "trigger_response"}))
        while not (isinstance(told := socket.recv(), str) and json.loads(told)["type"] != "text"):
            pass


def converse(worker: Worker) -> None:
    address = worker.url.replace("http", "ws")
    said = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": SECRET}]}
    session = {"type": "realtime", "instructions": SECRET, SECRET: SECRET}
    with connect(f"{address}/v1/realtime?model={SECRET}") as socket:
        socket.send(SECRET)
        for event in (
            {"type": SECRET},
            {"type": "session.update", "session": session},
            {"type": "session.update", "session": {"voice": SECRET}},
            {"type": "conversation.item.create", "item": said | {"role": SECRET}},
            {"type": "conversation.item.create", "item": said},
            {"type": "response.create", "response": {"instructions": SECRET}},
        ):
            socket.send(json.dumps(event))
        while json.loads(socket.recv())["type"] != "response.done":
            pass


@pytest.mark.parametrize(
    "steps",
    [
        REPLY,
        (RequestError(f"the conversation is too long: {SECRET}"),),
        (TextDelta("a"), sound(500), GenerationError("the device failed")),
    ],
    ids=["whole", "refused", "failed"],
)
def test_nothing_that_was_said_or_replied_stands_in_the_log(steps: tuple[Step, ...]) -> None:
    with (
        logged(TextLines(), JsonLines()) as handlers,
        worker_on_loopback(FakeEngine(*steps)) as worker,
    ):
        speak(worker)
    for handler in handlers:
        assert len(handler.lines) > 30
        assert [text for text in handler.lines if SECRET in text] == []


def test_the_level_debug_tells_what_a_caller_did_wrong() -> None:
    with (
        logged(TextLines(), level=logging.DEBUG) as (handler,),
        worker_on_loopback(FakeEngine(*REPLY)) as worker,
    ):
        talk(worker)
    assert any("DEBUG" in text and SECRET in text for text in handler.lines)
