import base64
import json
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from fake_engine import DONE, RATE_HZ, FakeEngine, call, serving, sound, sound_file, tone

from omnispeech.audio.io import encode_wav
from omnispeech.config import ServerConfig
from omnispeech.engine.events import Audio, EngineStatus, Text, TextDelta, TurnRequest
from omnispeech.errors import GenerationError, NotReady, Overloaded, RequestError
from omnispeech.server import worker_api
from omnispeech.server.worker_api import ERROR_TEXT

PATH = "/worker_generate_stream"
WAV = base64.b64encode(sound_file(tone(0.2))).decode()
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def objects(body: bytes) -> list[dict[str, Any]]:
    assert body.endswith(b"\0")
    return [json.loads(item) for item in body[:-1].split(b"\0")]


def one_by_one(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\0")
        yield from map(json.loads, whole)


async def heard(content: object, **fields: object) -> FakeEngine:
    engine = FakeEngine()
    body = {"messages": [{"role": "user", "content": content}], **fields}
    response = await call(engine, "POST", PATH, json=body)
    assert objects(response.content)[-1]["error_code"] == 0
    return engine


async def refused(body: object, **settings: object) -> str:
    """The reason; nothing reached the engine."""
    engine = FakeEngine()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await call(engine, "POST", PATH, settings, content=content)
    assert response.status_code == 200
    assert engine.requests == []
    (error,) = objects(response.content)
    reason = error.pop("reason")
    assert error == {"text": ERROR_TEXT, "audio": "", "finalize": True, "error_code": 1}
    return reason


async def test_a_reply_is_objects_with_the_whole_text_and_wav_blocks() -> None:
    response = await call(FakeEngine(), "POST", PATH, json=HELLO)
    first, second = (
        base64.b64encode(encode_wav(sound(n, at).pcm, RATE_HZ)).decode()
        for n, at in ((500, 0), (300, 500))
    )
    assert objects(response.content) == [
        {"text": "Hel", "audio": "", "finalize": False, "error_code": 0},
        {"text": "Hel", "audio": first, "finalize": False, "error_code": 0},
        {"text": "Hello", "audio": "", "finalize": False, "error_code": 0},
        {"text": "Hello", "audio": second, "finalize": False, "error_code": 0},
        {"text": "Hello", "audio": "", "finalize": True, "error_code": 0},
    ]
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"


async def test_each_audio_is_a_complete_wav_file(tmp_path: Any) -> None:
    response = await call(FakeEngine(), "POST", PATH, json=HELLO)
    block = tmp_path / "block.wav"
    block.write_bytes(base64.b64decode(objects(response.content)[1]["audio"]))
    samples, rate_hz = soundfile.read(block, dtype="int16")
    assert (rate_hz, samples.tolist()) == (RATE_HZ, list(range(500)))


async def test_a_nul_in_the_text_does_not_split_an_object() -> None:
    response = await call(FakeEngine(TextDelta("a\0b"), DONE), "POST", PATH, json=HELLO)
    assert [item["text"] for item in objects(response.content)] == ["a\0b", "a\0b"]


@pytest.mark.parametrize("content", ["hi", {"text": "hi"}, [{"text": "hi", "image": 3}]])
async def test_content_is_a_string_an_item_or_a_list_of_items(content: object) -> None:
    assert (await heard(content)).heard[0].content == (Text("hi"),)


async def test_b13_an_item_with_text_and_audio_keeps_both_text_first() -> None:
    text, audio = (await heard([{"audio": WAV, "text": "listen"}])).heard[0].content
    assert text == Text("listen")
    assert isinstance(audio, Audio)
    np.testing.assert_allclose(audio.samples, tone(0.2), atol=1 / 32768)


async def test_b13_control_tokens_in_the_text_arrive_as_they_were_sent() -> None:
    (text,) = (await heard("<|im_audio|>")).heard[0].content
    assert text == Text("<|im_audio|>")


async def test_b14_a_tenth_of_a_second_is_answered() -> None:
    tiny = base64.b64encode(sound_file(tone(0.1))).decode()
    (audio,) = (await heard({"text": "", "audio": tiny})).heard[0].content
    assert isinstance(audio, Audio) and len(audio.samples) == 1600


async def test_base64_in_lines_is_read() -> None:
    lines = base64.encodebytes(sound_file(tone(0.1))).decode()
    assert len((await heard({"audio": lines})).heard[0].content) == 1


async def test_all_turns_of_a_dialogue_arrive_in_order() -> None:
    engine = FakeEngine()
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"audio": WAV}, {"text": "what"}, {"audio": WAV}]},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": {"audio": WAV}},
    ]
    await call(engine, "POST", PATH, json={"messages": messages})
    kinds = [(m.role, [type(part).__name__ for part in m.content]) for m in engine.heard]
    assert kinds == [
        ("system", ["Text"]),
        ("user", ["Audio", "Text", "Audio"]),
        ("assistant", ["Text"]),
        ("user", ["Audio"]),
    ]


async def test_sampling_values_arrive() -> None:
    engine = await heard(
        "hi",
        temperature=0,
        top_p=0.5,
        max_new_tokens=77.0,
        speech_temperature=0.25,
        seed=5,
        model="x",
        other=[],
    )
    got = engine.requests[0]
    values = (got.temperature, got.top_p, got.max_new_tokens, got.speech_temperature, got.seed)
    assert values == (0.0, 0.5, 77, 0.25, 5)


async def test_defaults_are_those_of_the_original() -> None:
    got = (await heard("hi")).requests[0]
    assert (got.temperature, got.top_p, got.max_new_tokens, got.seed) == (1.0, 1.0, 256, None)


async def test_the_engine_alone_limits_the_new_tokens() -> None:
    assert (await heard("hi", max_new_tokens=5000)).requests[0].max_new_tokens == 5000


async def test_the_texts_of_one_request_together_are_limited() -> None:
    body = {
        "messages": [
            {"role": "system", "content": "1234"},
            {"role": "user", "content": [{"text": "5678"}, {"text": "90"}]},
        ]
    }
    told = "the text has 10 characters; send at most 9 (the server's max_text_chars)"
    assert await refused(body, max_text_chars=9) == told
    response = await call(FakeEngine(), "POST", PATH, {"max_text_chars": 10}, json=body)
    assert objects(response.content)[-1]["error_code"] == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"temperature": -1}, "temperature=-1.0; send 0 (greedy) to 10"),
        ({"temperature": "0.5"}, "temperature='0.5': input should be a valid number"),
        ({"temperature": float("nan")}, "temperature=nan: input should be a finite number"),
        ({"temperature": float("inf")}, "temperature=inf: input should be a finite number"),
        ({"temperature": True}, "temperature=True: input should be a valid number"),
        ({"temperature": None}, "temperature=None: input should be a valid number"),
        ({"top_p": 0}, "top_p=0.0; send more than 0, at most 1"),
        ({"top_p": 1.5}, "top_p=1.5; send more than 0, at most 1"),
        ({"top_p": float("nan")}, "top_p=nan: input should be a finite number"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; send 1 or more"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5: input should be a valid integer"),
        ({"max_new_tokens": "9"}, "max_new_tokens='9': input should be a valid integer"),
        ({"max_new_tokens": float("inf")}, "max_new_tokens=inf: input should be a valid integer"),
        ({"seed": -1}, "seed=-1; send 0 to 2**63 - 1"),
        ({"seed": "x"}, "seed='x': input should be a valid integer"),
    ],
)
async def test_wrong_sampling_values_are_refused(fields: dict[str, object], reason: str) -> None:
    assert await refused(HELLO | fields) == reason


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is empty; send at least one message of the user"),
        ("hi", "messages='hi': input should be a valid array"),
        ([{"role": "user", "content": []}], "messages[0] has neither text nor audio"),
        ([{"role": "user", "content": ""}], "messages[0] has neither text nor audio"),
        ([{"role": "user", "content": {"audio": ""}}], "messages[0] has neither text nor audio"),
        (
            [{"role": "user", "content": None}],
            "messages[0].content=None: send a string, an item or",
        ),
        ([{"role": "user", "content": [3]}], "messages[0].content[0]=3: input should be an object"),
        ([{"role": "user", "content": {"text": 3}}], "messages[0].content[0].text=3: input"),
        ([{"role": "user"}], "messages[0].content is missing; send it"),
        ([{"role": "robot", "content": "hi"}], "messages[0].role='robot'; known: system, user"),
        ([{"role": 1, "content": "hi"}], "messages[0].role=1: input should be a valid string"),
    ],
)
async def test_messages_that_say_nothing_or_are_malformed_are_refused(
    messages: object, reason: str
) -> None:
    assert (await refused({"messages": messages})).startswith(reason)


@pytest.mark.parametrize("body", [b"{", b'{"messages": [}', b"\xff\xfe"])
async def test_wrong_json_is_refused(body: bytes) -> None:
    assert (await refused(body)).startswith("the body is not valid JSON: ")


@pytest.mark.parametrize("body", [b"", b" \n"])
async def test_an_empty_body_is_called_so(body: bytes) -> None:
    assert await refused(body) == "the body is empty; send JSON"


@pytest.mark.parametrize("body", [[], "hi", 3, {}])
async def test_json_that_is_no_request_is_refused(body: object) -> None:
    reason = await refused(body)
    assert reason.startswith(("the body=", "messages is missing"))


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        ("?" + WAV, "messages[0].content[0].audio is not base64: "),
        (WAV[:-1], "messages[0].content[0].audio is not base64: "),
        (WAV[:-1] + "é", "messages[0].content[0].audio is not base64: "),
        ("data:audio/wav;base64," + WAV, "messages[0].content[0].audio is not base64: "),
        (base64.b64encode(b"hello").decode(), "messages[0].content[0].audio: the audio (5 bytes)"),
        (
            base64.b64encode(sound_file(tone(0))).decode(),
            "messages[0].content[0].audio: the audio has no samples",
        ),
        (
            base64.b64encode(sound_file(tone(1.1))).decode(),
            "messages[0].content[0].audio: the audio is longer than 1 s",
        ),
    ],
)
async def test_audio_that_cannot_be_used_is_refused_with_its_place(audio: str, reason: str) -> None:
    body = {"messages": [{"role": "user", "content": {"audio": audio}}]}
    assert (await refused(body, max_audio_s=1.0)).startswith(reason)


async def test_many_items_together_are_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnispeech.server.protocol.MAX_REQUEST_AUDIO_S", 0.5)
    body = {"messages": [{"role": "user", "content": [{"audio": WAV}] * 3}]}
    assert (await refused(body)).startswith("messages[0].content[2].audio: the audio is longer")


async def test_b17_an_error_in_mid_reply_tells_the_reason_and_ends_the_stream() -> None:
    engine = FakeEngine(TextDelta("Hel"), GenerationError("the device is out of memory"))
    *_, error = objects((await call(engine, "POST", PATH, json=HELLO)).content)
    assert error == {
        "text": ERROR_TEXT,
        "audio": "",
        "finalize": True,
        "error_code": 1,
        "reason": "the device is out of memory",
    }


@pytest.mark.parametrize("error", [RequestError("too long"), GenerationError("device")])
async def test_b17_a_refusal_of_the_engine_is_an_error_object(error: Exception) -> None:
    response = await call(FakeEngine(error), "POST", PATH, json=HELLO)
    assert response.status_code == 200
    assert objects(response.content)[0]["reason"] == str(error)


@pytest.mark.parametrize(("error", "after"), [(Overloaded("full"), "1"), (NotReady("wait"), "5")])
async def test_later_is_503_with_the_same_error_object(error: Exception, after: str) -> None:
    response = await call(FakeEngine(error), "POST", PATH, json=HELLO)
    assert (response.status_code, response.headers["retry-after"]) == (503, after)
    (told,) = objects(response.content)
    assert (told["error_code"], told["finalize"], told["reason"]) == (1, True, str(error))


async def test_status_counts_those_who_talk_and_those_who_wait() -> None:
    engine = FakeEngine(status=EngineStatus(ready=True, running=3, waiting=2))
    response = await call(engine, "POST", "/worker_get_status", {"model_name": "talker"})
    assert response.json() == {"model_names": ["talker"], "speed": 1, "queue_length": 5}


@pytest.mark.parametrize("first", [TextDelta("Hel"), sound(500)])
def test_b1_text_and_audio_are_sent_as_they_come_and_wait_for_nothing(first: Any) -> None:
    gate = threading.Event()
    with (
        serving(FakeEngine(first, gate, DONE)) as url,
        httpx.stream("POST", url + PATH, json=HELLO) as response,
    ):
        stream = one_by_one(response.iter_raw())
        item = next(stream)  # the engine has not gone on
        assert not item["finalize"] and (item["text"] or item["audio"])
        gate.set()
        assert next(stream)["finalize"]


def test_b2_a_final_phase_of_more_than_15_seconds_is_not_cut_off() -> None:
    """The limit of the original; the socket, too, is that of a real server."""
    gate = threading.Event()
    with (
        serving(FakeEngine(TextDelta("a"), gate, DONE)) as url,
        httpx.stream("POST", url + PATH, json=HELLO, timeout=None) as response,
    ):
        stream = one_by_one(response.iter_raw())
        next(stream)
        time.sleep(15.2)
        gate.set()
        assert next(stream)["error_code"] == 0


def test_c2_a_caller_that_leaves_in_mid_reply_ends_the_generation() -> None:
    engine = FakeEngine(TextDelta("a"), threading.Event())
    with serving(engine) as url:
        with httpx.stream("POST", url + PATH, json=HELLO) as response:
            next(stream := one_by_one(response.iter_raw()))
            assert not engine.cancelled.is_set()
            stream.close()
        assert engine.cancelled.wait(2)


def test_c2_a_caller_that_leaves_while_it_waits_ends_the_generation() -> None:
    engine = FakeEngine(threading.Event())
    with serving(engine) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + PATH, json=HELLO, timeout=0.3)
        assert engine.cancelled.wait(2)


def test_c1_a_server_that_waits_for_one_reply_serves_others() -> None:
    gate = threading.Event()
    engine = FakeEngine(TextDelta("a"), gate, DONE)
    with serving(engine) as url, httpx.stream("POST", url + PATH, json=HELLO):
        assert httpx.get(url + "/health", timeout=2).status_code == 200
        assert httpx.post(url + "/worker_get_status", timeout=2).json()["speed"] == 1
        gate.set()


def test_c1_the_loop_is_free_while_a_request_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, decoding = threading.Event(), threading.Event()
    original = worker_api.parse_worker_request

    def slow(body: bytes, config: ServerConfig) -> TurnRequest:
        decoding.set()
        assert gate.wait(5)
        return original(body, config)

    monkeypatch.setattr(worker_api, "parse_worker_request", slow)
    with serving(FakeEngine()) as url, ThreadPoolExecutor() as pool:
        waiting = pool.submit(httpx.post, url + PATH, json=HELLO)
        assert decoding.wait(5)
        assert httpx.get(url + "/health", timeout=2).status_code == 200
        gate.set()
        assert objects(waiting.result().content)[-1]["error_code"] == 0


async def test_c6_audio_is_16_bit_pcm_and_sent_once() -> None:
    response = await call(FakeEngine(), "POST", PATH, json=HELLO)
    blocks = [base64.b64decode(i["audio"]) for i in objects(response.content) if i["audio"]]
    assert [len(block) for block in blocks] == [44 + 2 * 500, 44 + 2 * 300]


async def test_b14_too_many_messages_are_refused_with_both_numbers() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}] * 3}
    told = "the request has 3 messages; send at most 2 (the server's max_messages)"
    assert await refused(body, max_messages=2) == told
