import base64
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
from fake_engine import DONE, FakeEngine, call, sound
from openai_client import MODEL, async_client_address, client_of

from omnispeech.engine.events import Message, Text, TextDelta
from omnispeech.errors import GenerationError, Overloaded, RequestError, Unsupported

PATH = "/v1/audio/speech"
WHOLE = replace(DONE, speech_finish="stop")
SPOKEN = (TextDelta("Hello."), sound(5000), sound(25_000, 5000), WHOLE)
FRAMES = round(30_000 * 24_000 / 22_050)
WANTED: Any = {"model": MODEL, "voice": "alloy", "input": "Hello."}
TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg;codecs=opus",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm;rate=24000;channels=1",
}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with client_of(FakeEngine(*SPOKEN)) as client:
        yield client


def frames_of(data: bytes, form: str) -> int:
    raw = {"samplerate": 24_000, "channels": 1, "subtype": "PCM_16", "format": "RAW"}
    samples, rate_hz = soundfile.read(io.BytesIO(data), **(raw if form == "pcm" else {}))
    assert rate_hz == 24_000
    return len(samples)


@pytest.mark.parametrize("form", sorted(TYPES))
def test_a_text_becomes_a_file_and_its_rate_is_in_the_headers(
    client: openai.OpenAI, form: Any
) -> None:
    answer = client.audio.speech.create(**WANTED, response_format=form)
    assert answer.response.headers["content-type"] == TYPES[form]
    assert answer.response.headers["x-sample-rate"] == "24000"
    assert 0 <= frames_of(answer.read(), form) - FRAMES < (2400 if form == "mp3" else 1)


def test_mp3_is_what_comes_unasked(client: openai.OpenAI) -> None:
    answer = client.audio.speech.create(**WANTED)
    assert answer.response.headers["content-type"] == "audio/mpeg"


def test_the_text_is_the_script_and_the_model_is_told_to_say_it() -> None:
    with client_of(engine := FakeEngine(*SPOKEN)) as client:
        client.audio.speech.create(**WANTED, instructions="Speak slowly.")
    (turn,) = engine.requests
    assert (turn.script, turn.speech) == ("Hello.", True)
    assert turn.messages[0] == Message("system", (Text("Speak slowly."),))
    assert turn.messages[1].content[0].text.endswith("\nHello.")


@pytest.mark.parametrize("form", ["pcm", "wav", "mp3"])
def test_sound_is_sent_while_the_rest_is_being_made(form: Any) -> None:
    rest = threading.Event()
    engine = FakeEngine(TextDelta("Hello."), sound(15_000), rest, WHOLE)
    with (
        client_of(engine) as client,
        client.audio.speech.with_streaming_response.create(
            **WANTED, response_format=form
        ) as answer,
    ):
        pieces = answer.iter_bytes()
        first = next(pieces)
        while len(first) < 4000:
            first += next(pieces)
        rest.set()
        whole = first + b"".join(pieces)
    assert whole.count(b"RIFF") == (form == "wav")
    assert len(whole) > len(first)


def test_pcm_of_many_blocks_has_no_seam() -> None:
    blocks = [sound(1000, at) for at in range(0, 30_000, 1000)]
    with client_of(FakeEngine(TextDelta("Hello."), *blocks, WHOLE)) as client:
        data = client.audio.speech.create(**WANTED, response_format="pcm").read()
    ramp = np.frombuffer(data, "<i2").astype(int)
    assert np.abs(np.diff(ramp[300:-300])).max() <= 2


@pytest.mark.parametrize("form", sorted(TYPES))
async def test_as_events_the_same_sound_comes_with_its_usage(form: str) -> None:
    body = WANTED | {"response_format": form, "stream_format": "sse"}
    response = await call(FakeEngine(*SPOKEN), "POST", PATH, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.removesuffix("\n\n").split("\n\n")
    *deltas, done = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {delta["type"] for delta in deltas} == {"speech.audio.delta"}
    assert max(len(line) for line in lines) < 1 << 16
    data = base64.b64decode("".join(delta["audio"] for delta in deltas), validate=True)
    assert 0 <= frames_of(data, form) - FRAMES < (2400 if form == "mp3" else 1)
    assert done["type"] == "speech.audio.done"
    assert [done["usage"][f"{kind}_tokens"] for kind in ("input", "output", "total")] == [7, 27, 34]


async def test_an_error_among_events_is_the_last_of_them() -> None:
    engine = FakeEngine(TextDelta("Hello."), sound(9000), GenerationError("the device failed"))
    body = WANTED | {"stream_format": "sse", "response_format": "pcm"}
    response = await call(engine, "POST", PATH, json=body)
    last = json.loads(response.text.removesuffix("\n\n").split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["message"] == "the device failed"


def test_an_error_in_the_middle_of_sound_breaks_the_connection() -> None:
    engine = FakeEngine(TextDelta("Hello."), sound(9000), GenerationError("the device failed"))
    with (
        client_of(engine) as client,
        pytest.raises(openai.APIConnectionError) as info,
    ):
        client.audio.speech.create(**WANTED, response_format="pcm")
    assert "incomplete" in str(info.value.__cause__)


async def test_the_async_client_hears_it() -> None:
    with async_client_address(FakeEngine(*SPOKEN)) as arguments:
        async with openai.AsyncOpenAI(**arguments) as client:
            answer = await client.audio.speech.create(**WANTED, response_format="wav")
            assert frames_of(await answer.aread(), "wav") == FRAMES


@pytest.mark.parametrize("voice", ["default", "alloy", "marin", {"id": "default"}])
def test_names_of_openais_voices_stand_for_the_one_voice(client: openai.OpenAI, voice: Any) -> None:
    assert client.audio.speech.create(**WANTED | {"voice": voice}).read()


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("voice", "Bob", "invalid_value"),
        ("speed", 1.5, "unsupported_parameter"),
        ("response_format", "aac", "invalid_value"),
        ("response_format", "ulaw", "invalid_value"),
        ("stream_format", "ndjson", "invalid_value"),
        ("input", "", "invalid_value"),
        ("input", " \n", "invalid_value"),
        ("input", "a" * 4097, "string_above_max_length"),
        ("instructions", "a" * 4097, "string_above_max_length"),
        ("input", 5, "invalid_value"),
        ("extra_body", {"pitch": 2}, "unknown_parameter"),
    ],
)
def test_what_cannot_be_spoken_is_refused_by_name(
    client: openai.OpenAI, field: str, value: Any, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as info:
        client.audio.speech.create(**WANTED | {field: value})
    assert (info.value.code, info.value.param) == (
        code,
        field if field != "extra_body" else "pitch",
    )


@pytest.mark.parametrize("body", [{"speech_temperature": -1}, {"seed": -1}])
def test_a_number_out_of_range_is_named(client: openai.OpenAI, body: dict[str, int]) -> None:
    with pytest.raises(openai.BadRequestError) as info:
        client.audio.speech.create(**WANTED, extra_body=body)
    [(name, value)] = body.items()
    assert info.value.param == name and f"{name}={value}" in info.value.message


def test_the_formats_are_named_as_this_route_calls_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="'mp3', 'opus', 'flac', 'wav' or 'pcm'"):
        client.audio.speech.create(**WANTED, response_format="aac")


@pytest.mark.parametrize(("field", "status"), [("voice", 400), ("model", 404)])
def test_a_long_value_is_told_back_short(client: openai.OpenAI, field: str, status: int) -> None:
    with pytest.raises(openai.APIStatusError) as info:
        client.audio.speech.create(**WANTED | {field: "a" * 10_000})
    assert info.value.status_code == status and len(info.value.response.content) < 500


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'omnispeech'"):
        client.audio.speech.create(**WANTED | {"model": "tts-1"})


def test_a_text_longer_than_the_model_can_say_is_refused_before_any_sound() -> None:
    engine = FakeEngine(RequestError("the text to be spoken has 900 tokens; send at most 800"))
    with client_of(engine) as client, pytest.raises(openai.BadRequestError) as info:
        client.audio.speech.create(**WANTED)
    assert (info.value.code, info.value.param) == ("string_above_max_length", "input")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(Unsupported("not here"), 501, "unsupported"), (Overloaded("full"), 503, "overloaded")],
)
def test_what_is_no_fault_of_the_text_is_told_as_it_is(
    error: Exception, status: int, code: str
) -> None:
    with client_of(FakeEngine(error)) as client, pytest.raises(openai.APIStatusError) as info:
        client.audio.speech.create(**WANTED)
    assert (info.value.status_code, info.value.code, info.value.param) == (status, code, None)


def test_who_stops_listening_ends_the_turn() -> None:
    engine = FakeEngine(TextDelta("Hello."), sound(15_000), threading.Event())
    with client_of(engine) as client:
        speech = client.audio.speech.with_streaming_response
        with speech.create(**WANTED, response_format="pcm") as answer:
            next(answer.iter_bytes())
        assert engine.cancelled.wait(5)
