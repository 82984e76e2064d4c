"""OpenAI's protocols over HTTP with the small model, which really hears and speaks."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import soundfile
from fake_engine import serving
from openai_client import MODEL, check_type
from small_models import ANSWERS, heard, recorded, small_worker, words

from omnispeech.config import TalkConfig

SOUND = base64.b64encode(recorded("sum")).decode()
PART = {"type": "input_audio", "input_audio": {"data": SOUND, "format": "flac"}}
MESSAGES: Any = [{"role": "user", "content": [PART]}]
QUESTION: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "seed": 7}
QUESTION |= {"temperature": 0}
SPOKEN: Any = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
TEXT = "Yellow banana monkey."


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with (
        small_worker(kv_tokens=8192, context_length=4096) as worker,
        serving(worker, talk=TalkConfig(transcription="model")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_the_same_question_has_the_same_answer_whole_and_streamed(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    whole = create(**QUESTION, **SPOKEN)
    chunks = list(create(**QUESTION, **SPOKEN, stream=True, stream_options={"include_usage": True}))
    for answer in (whole, *chunks):
        check_type(answer)
    parts = [c.choices[0].delta.audio for c in chunks if c.choices and c.choices[0].delta.audio]
    audio = whole.choices[0].message.audio
    assert audio and audio.transcript == "".join(part.transcript or "" for part in parts)
    assert audio.transcript == ANSWERS["sum"]
    sound = base64.b64decode("".join(part.data or "" for part in parts))
    assert len(sound) == len(base64.b64decode(audio.data)) > 4800
    assert whole.usage and whole.usage.prompt_tokens_details
    assert whole.usage.prompt_tokens_details.audio_tokens > 0
    assert whole.usage.completion_tokens_details.audio_tokens > 0
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_a_second_turn_knows_the_first_by_its_audio_id(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    first = create(**QUESTION, **SPOKEN)
    message = first.choices[0].message
    second = create(**QUESTION | {"messages": [*MESSAGES, message, *MESSAGES]})
    written: Any = {"role": "assistant", "content": message.audio.transcript}
    same = create(**QUESTION | {"messages": [*MESSAGES, written, *MESSAGES]})
    assert second.choices[0].message.content == same.choices[0].message.content
    assert second.usage.prompt_tokens == same.usage.prompt_tokens > first.usage.prompt_tokens
    assert same.usage.prompt_tokens_details.cached_tokens > 0


def test_a_text_alone_is_answered_without_sound(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**QUESTION)
    assert answer.choices[0].message.content == ANSWERS["sum"]
    assert answer.usage.completion_tokens_details.audio_tokens == 0
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("form", ["wav", "mp3", "flac", "opus"])
def test_a_text_is_spoken(client: openai.OpenAI, form: Any) -> None:
    data = client.audio.speech.create(
        model=MODEL,
        voice="alloy",
        input=TEXT,
        response_format=form,
        extra_body={"seed": 3},
    ).read()
    samples, rate_hz = soundfile.read(io.BytesIO(data), dtype="int16")
    assert heard(samples, rate_hz) == words(TEXT)


def test_a_text_longer_than_the_model_can_say_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tokens") as info:
        client.audio.speech.create(model=MODEL, voice="alloy", input="Hello. " * 580)
    assert info.value.param == "input"


def test_a_conversation_longer_than_the_context_is_refused(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "word " * 5000}]
    with pytest.raises(openai.BadRequestError) as info:
        client.chat.completions.create(model=MODEL, messages=messages)
    assert info.value.code == "context_length_exceeded"
