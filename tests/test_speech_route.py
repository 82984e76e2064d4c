import base64
import io
import json
import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from fake_engine import DONE, RATE_HZ, FakeEngine, app_with, call, serving, sound, sound_file, tone

from omnispeech.engine.events import Text, TextDelta
from omnispeech.errors import GenerationError, Overloaded

PATH = "/v1/speech"
WAV = sound_file(tone(0.2))
SUMMARY = {
    "finish": {"text": "stop", "speech": "length"},
    "usage": {"prompt_tokens": 7, "text_tokens": 2, "units": 25},
    "seed": 11,
    "timings": {
        "first_text_s": 0.1,
        "first_audio_s": 0.2,
        "total_s": 1.0,
        "audio_s": 2.0,
        "real_time_factor": 0.5,
    },
}


def server_sent(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    blocks = body.decode().removesuffix("\n\n").split("\n\n")
    lines = [block.split("\n") for block in blocks]
    return [(n.removeprefix("event: "), json.loads(d.removeprefix("data: "))) for n, d in lines]


async def test_a_reply_is_one_wav_file_by_default() -> None:
    response = await call(FakeEngine(), "POST", PATH, content=WAV)
    assert response.headers["content-type"] == "audio/wav"
    assert response.content.count(b"RIFF") == 1
    samples, rate_hz = soundfile.read(io.BytesIO(response.content), dtype="int16")
    assert (rate_hz, samples.tolist()) == (RATE_HZ, list(range(800)))


async def test_pcm_is_raw_samples_with_the_rate_in_the_type() -> None:
    response = await call(FakeEngine(), "POST", PATH + "?format=pcm", content=WAV)
    assert response.headers["content-type"] == "audio/pcm;rate=22050;channels=1"
    assert response.content == sound(800).pcm


async def test_c6_text_events_hold_what_is_new_and_nothing_twice() -> None:
    words = [f"word{i} " for i in range(300)]
    engine = FakeEngine(*map(TextDelta, words), DONE)
    response = await call(engine, "POST", PATH + "?format=events", content=WAV)
    assert [data["text"] for name, data in server_sent(response.content)[:-1]] == words
    assert len(response.content) < 60 * len(words)


async def test_events_tell_text_audio_and_the_end() -> None:
    response = await call(FakeEngine(), "POST", PATH + "?format=events", content=WAV)
    assert response.headers["content-type"].startswith("text/event-stream")
    audio = [base64.b64encode(sound(n, at).pcm).decode() for n, at in ((500, 0), (300, 500))]
    assert server_sent(response.content) == [
        ("text", {"text": "Hel"}),
        ("audio", {"audio": audio[0], "rate_hz": RATE_HZ}),
        ("text", {"text": "lo"}),
        ("audio", {"audio": audio[1], "rate_hz": RATE_HZ}),
        ("done", {"turn_id": response.headers["x-turn-id"], **SUMMARY}),
    ]


@pytest.mark.parametrize("form", ["wav", "pcm", "events"])
async def test_nothing_between_may_keep_a_stream_back(form: str) -> None:
    response = await call(FakeEngine(), "POST", f"{PATH}?format={form}", content=WAV)
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize(("rate_hz", "channels"), [(8_000, 1), (44_100, 2), (48_000, 1)])
async def test_any_sound_file_is_a_question(form: str, rate_hz: int, channels: int) -> None:
    engine = FakeEngine()
    data = sound_file(tone(0.3, rate_hz, channels), rate_hz, form)
    await call(engine, "POST", PATH, content=data, headers={"content-type": "text/plain"})
    (audio,) = engine.heard[0].content
    assert len(audio.samples) == pytest.approx(4_800, abs=1)
    assert audio.samples.dtype == np.float32


async def test_parameters_arrive() -> None:
    engine = FakeEngine()
    query = (
        "?temperature=0&top_p=0.5&max_new_tokens=5000&seed=3&speech_temperature=2&system=be+kind"
    )
    await call(engine, "POST", PATH + query, content=WAV)
    got = engine.requests[0]
    values = (got.temperature, got.top_p, got.max_new_tokens, got.seed, got.speech_temperature)
    assert values == (0.0, 0.5, 5000, 3, 2.0)
    assert [(m.role, m.content) for m in got.messages[:1]] == [("system", (Text("be kind"),))]


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("format=ogg", "format='ogg': input should be 'wav', 'pcm' or 'events'"),
        ("temperature=nan", "temperature='nan': input should be a finite number"),
        ("temperature=-1", "temperature=-1.0; send 0 (greedy) to 10"),
        ("temperature=warm", "temperature='warm': input should be a valid number"),
        ("top_p=0", "top_p=0.0; send more than 0, at most 1"),
        ("max_new_tokens=0", "max_new_tokens=0; send 1 or more"),
        ("seed=-1", "seed=-1; send 0 to 2**63 - 1"),
        (
            "temprature=1",
            "unknown parameter 'temprature'; known: format, system, max_new_tokens, temperature, "
            "top_p, speech_temperature, seed",
        ),
    ],
)
async def test_wrong_parameters_are_400_and_named(query: str, reason: str) -> None:
    engine = FakeEngine()
    response = await call(engine, "POST", f"{PATH}?{query}", content=WAV)
    assert response.status_code == 400
    assert response.json()["error"] == {"type": "RequestError", "message": reason[:]} or (
        response.json()["error"]["message"].startswith(reason)
    )
    assert engine.requests == []


async def test_a_longer_system_text_than_the_setting_allows_is_refused() -> None:
    engine, settings = FakeEngine(), {"max_text_chars": 5}
    response = await call(engine, "POST", PATH + "?system=be+kind", settings, content=WAV)
    assert response.status_code == 400
    told = "the text has 7 characters; send at most 5 (the server's max_text_chars)"
    assert response.json()["error"] == {"type": "RequestError", "message": told}
    assert engine.requests == []
    fits = await call(engine, "POST", PATH + "?system=kind!", settings, content=WAV)
    assert fits.status_code == 200


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "the audio is empty (0 bytes)"),
        (b"hello", "the audio (5 bytes) cannot be decoded"),
        (sound_file(tone(0)), "the audio has no samples"),
        (sound_file(tone(1.1)), "the audio is longer than 1 s"),
    ],
)
async def test_audio_that_cannot_be_used_is_400(body: bytes, reason: str) -> None:
    response = await call(FakeEngine(), "POST", PATH, {"max_audio_s": 1.0}, content=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "AudioError"
    assert error["message"].startswith(reason)


@pytest.mark.parametrize("form", ["wav", "pcm", "events"])
async def test_a_refusal_comes_before_the_stream_starts(form: str) -> None:
    engine = FakeEngine(Overloaded("full"))
    response = await call(engine, "POST", f"{PATH}?format={form}", content=WAV)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


def turn(url: str, response: httpx.Response) -> dict[str, Any]:
    return httpx.get(f"{url}{PATH}/{response.headers['x-turn-id']}").json()


def test_the_text_can_be_asked_for_while_the_sound_runs_and_after() -> None:
    gate = threading.Event()
    engine = FakeEngine(TextDelta("Hel"), sound(9), gate, TextDelta("lo"), DONE)
    with serving(engine) as url:
        with httpx.stream("POST", url + PATH, content=WAV) as response:
            next(stream := response.iter_raw())
            turn_id = response.headers["x-turn-id"]
            running = {"turn_id": turn_id, "status": "running", "text": "Hel"}
            assert turn(url, response) == running
            gate.set()
            list(stream)
        done = {"turn_id": turn_id, "status": "done", "text": "Hello", **SUMMARY}
        assert turn(url, response) == done


@pytest.mark.parametrize("form", ["wav", "pcm"])
def test_an_error_in_mid_reply_breaks_the_connection_and_is_told_in_the_turn(form: str) -> None:
    engine = FakeEngine(TextDelta("Hel"), sound(9), GenerationError("the device failed"))
    with serving(engine) as url:
        with (
            pytest.raises(httpx.RemoteProtocolError),
            httpx.stream("POST", f"{url}{PATH}?format={form}", content=WAV) as response,
        ):
            list(response.iter_raw())
        told = turn(url, response)
    assert (told["status"], told["failure"], told["text"]) == ("failed", "the device failed", "Hel")


async def test_an_error_in_mid_reply_is_an_event() -> None:
    engine = FakeEngine(TextDelta("Hel"), GenerationError("the device failed"))
    response = await call(engine, "POST", PATH + "?format=events", content=WAV)
    error = {"type": "GenerationError", "message": "the device failed"}
    assert server_sent(response.content)[-1] == ("error", error)


@pytest.mark.parametrize("form", ["wav", "pcm", "events"])
def test_c2_a_caller_that_leaves_ends_the_generation_and_the_turn(form: str) -> None:
    engine = FakeEngine(sound(9), threading.Event())
    with serving(engine) as url:
        with httpx.stream("POST", f"{url}{PATH}?format={form}", content=WAV) as response:
            next(response.iter_raw())
        assert engine.cancelled.wait(2)
        time.sleep(0.05)
        assert turn(url, response)["status"] == "cancelled"


def test_c2_a_caller_that_reads_nothing_and_leaves_ends_the_generation() -> None:
    engine = FakeEngine(*[sound(30_000)] * 500, threading.Event())
    with serving(engine) as url:
        with httpx.stream("POST", url + PATH, content=WAV):
            time.sleep(0.3)  # 30 MB do not fit into the buffers: the server waits in send
        assert engine.cancelled.wait(2)


def test_c2_a_caller_that_leaves_while_it_waits_ends_the_generation() -> None:
    engine = FakeEngine(threading.Event())
    with serving(engine) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + PATH, content=WAV, timeout=0.3)
        assert engine.cancelled.wait(2)


async def test_only_the_last_texts_are_kept() -> None:
    transport = httpx.ASGITransport(app_with(FakeEngine(), keep_texts=2))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        turns = [(await client.post(PATH, content=WAV)).headers["x-turn-id"] for _ in range(4)]
        codes = [(await client.get(f"{PATH}/{turn_id}")).status_code for turn_id in turns]
    assert codes == [404, 200, 200, 200]  # two that ended before the last one began, and it
