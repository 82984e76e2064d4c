from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from fake_engine import DONE, FakeEngine, call, serving, sound_file, tone
from openai_client import MODEL, async_client_address, check_type, client_of

from omnispeech.config import TalkConfig
from omnispeech.engine.events import Audio, TextDelta
from omnispeech.errors import RequestError
from omnispeech.server.transcription import INSTRUCTION, transcribe

PATH = "/v1/audio/transcriptions"
ON = TalkConfig(transcription="model")
WHOLE = replace(DONE, units=0)
WORDS = (TextDelta(" go"), TextDelta(" on\n"), WHOLE)
CUT = (TextDelta("go"), replace(WHOLE, text_finish="length"))
WAV = sound_file(tone(0.5))
WANTED: Any = {"model": MODEL, "file": ("a.wav", WAV)}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(*WORDS)


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[openai.OpenAI]:
    with client_of(engine, talk=ON) as client:
        yield client


@pytest.mark.parametrize("size_s", [0.5, 300])
def test_off_it_is_refused_with_the_reason_and_the_setting(size_s: float) -> None:
    upload = sound_file(tone(size_s))
    with (
        client_of(FakeEngine()) as client,
        pytest.raises(openai.InternalServerError, match="--transcription model") as info,
    ):
        client.audio.transcriptions.create(model=MODEL, file=("a.wav", upload))
    assert (info.value.status_code, info.value.code) == (501, "unsupported")
    assert info.value.response.headers["x-should-retry"] == "false"


async def test_translations_are_refused_with_the_reason() -> None:
    response = await call(FakeEngine(), "POST", "/v1/audio/translations", files={"file": WAV})
    assert (response.status_code, response.json()["error"]["code"]) == (501, "unsupported")


def test_the_model_is_asked_for_the_words_and_gives_them(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    answer = client.audio.transcriptions.create(**WANTED)
    check_type(answer)
    assert answer.text == "go on"
    assert (answer.usage.type, answer.usage.total_tokens) == ("tokens", 9)
    (turn,) = engine.requests
    assert (turn.speech, turn.temperature) == (False, 0.0)
    assert turn.messages[0].content[0].text == INSTRUCTION
    (heard,) = turn.messages[1].content
    assert isinstance(heard, Audio) and len(heard.samples) == 8000


def test_as_text_it_is_the_words_alone(client: openai.OpenAI) -> None:
    assert client.audio.transcriptions.create(**WANTED, response_format="text") == "go on\n"


def test_it_streams_as_events(client: openai.OpenAI) -> None:
    events: list[Any] = list(client.audio.transcriptions.create(**WANTED, stream=True))
    for event in events:
        check_type(event)
    assert [event.type for event in events] == [
        "transcript.text.delta",
        "transcript.text.delta",
        "transcript.text.done",
    ]
    assert "".join(event.delta for event in events[:2]).strip() == events[2].text == "go on"


async def test_the_async_client_gets_them_too(engine: FakeEngine) -> None:
    with async_client_address(engine, talk=ON) as arguments:
        async with openai.AsyncOpenAI(**arguments) as client:
            assert (await client.audio.transcriptions.create(**WANTED)).text == "go on"


@pytest.mark.parametrize(
    ("name", "value", "param"),
    [
        ("response_format", "verbose_json", "response_format"),
        ("response_format", "srt", "response_format"),
        ("response_format", "vtt", "response_format"),
        ("timestamp_granularities", ["word"], "timestamp_granularities[]"),
        ("include", ["logprobs"], "include[]"),
        ("language", "de", "language"),
        ("prompt", "names: Zoe", "prompt"),
        ("temperature", 0.5, "temperature"),
        ("chunking_strategy", "auto", "chunking_strategy"),
        ("extra_body", {"speakers": "2"}, "speakers"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    client: openai.OpenAI, engine: FakeEngine, name: str, value: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as info:
        client.audio.transcriptions.create(**WANTED, **{name: value})
    assert info.value.param == param
    assert engine.requests == []


def test_a_file_that_is_no_sound_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as info:
        client.audio.transcriptions.create(model=MODEL, file=("a.wav", b"noise"))
    assert (info.value.code, info.value.param) == ("invalid_audio", "file")


def test_a_transcript_that_was_cut_is_no_transcript() -> None:
    with client_of(FakeEngine(*CUT), talk=ON) as client:
        with pytest.raises(openai.BadRequestError, match="send a shorter sound"):
            client.audio.transcriptions.create(**WANTED)
        with pytest.raises(openai.APIError, match="send a shorter sound"):
            list(client.audio.transcriptions.create(**WANTED, stream=True))


@pytest.mark.parametrize(
    "body",
    [
        {"json": {"file": "a"}},
        {"data": {"model": MODEL}},
        {"content": b"--x", "headers": {"content-type": "multipart/form-data; boundary=y"}},
        {"content": b"", "headers": {"content-type": "multipart/form-data"}},
        {"files": [("file", WAV), ("file", WAV)]},
    ],
)
def test_a_form_that_is_none_is_refused_in_openais_shape(body: Any) -> None:
    with serving(FakeEngine(), talk=ON) as url:
        response = httpx.post(url + PATH, **body)
    assert response.status_code == 400
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


async def test_a_talk_can_ask_for_a_transcript(engine: FakeEngine) -> None:
    assert await transcribe(engine, tone(0.2)) == "go on"
    with pytest.raises(RequestError, match="send a shorter sound"):
        await transcribe(FakeEngine(*CUT), tone(0.2))
