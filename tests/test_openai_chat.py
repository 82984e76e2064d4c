import base64
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
from fake_engine import DONE, FakeEngine, call, serving, sound, sound_file, tone
from openai_client import MODEL, async_client_address, check_type, client_of

from omnispeech.config import TalkConfig
from omnispeech.engine.events import Audio, EngineStatus, Message, Text, TextDelta, ToolCall
from omnispeech.errors import (
    GenerationError,
    Overloaded,
    PromptTooLong,
    TooManyRequests,
    Unsupported,
)
from omnispeech.server.openai import audio_memory

PATH = "/v1/chat/completions"
OLD_SDK = Path(sys.prefix) / "openai-3.3.1"
WHOLE = replace(DONE, speech_finish="stop", audio_tokens=3, cached_tokens=2)
SPOKEN = (TextDelta("Hel"), sound(5000), TextDelta("lo"), sound(25_000, 5000), WHOLE)
WRITTEN = (TextDelta("Hel"), TextDelta("lo"), replace(WHOLE, units=0))
CALL = ToolCall("weather", '{"city": "Rome"}')
AUDIO: Any = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
OPUS: Any = AUDIO | {"audio": {"voice": "alloy", "format": "opus"}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
]
HELLO: Any = [{"role": "user", "content": "hello"}]
QUESTION: Any = {"model": MODEL, "messages": HELLO}


def input_audio(data: bytes, form: str = "wav") -> Any:
    sound = {"data": base64.b64encode(data).decode(), "format": form}
    return {"type": "input_audio", "input_audio": sound}


def ask(engine: FakeEngine, **request: Any) -> Any:
    with client_of(engine) as client:
        answer = client.chat.completions.create(**QUESTION | request)
    check_type(answer)
    return answer


def chunks_of(engine: FakeEngine, **request: Any) -> list[Any]:
    with client_of(engine) as client:
        chunks = list(client.chat.completions.create(**QUESTION | request, stream=True))
    for chunk in chunks:
        check_type(chunk)
    return chunks


@pytest.fixture(scope="module")
def idle() -> Iterator[openai.OpenAI]:
    """Of a server that is asked for nothing it does: its engine would have no answer."""
    with client_of(FakeEngine(AssertionError("a turn has begun"))) as client:
        yield client


def refused(client: openai.OpenAI, **request: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as info:
        client.chat.completions.create(**QUESTION | request)
    assert info.value.type and info.value.message
    return info.value


def audio_parts(chunks: list[Any]) -> list[Any]:
    return [c.choices[0].delta.audio for c in chunks if c.choices and c.choices[0].delta.audio]


def expected_samples(samples_at_22k: int) -> int:
    return round(samples_at_22k * 24_000 / 22_050)


def test_a_text_is_answered_with_a_text() -> None:
    answer = ask(engine := FakeEngine(*WRITTEN))
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("Hello", "stop")
    assert (choice.message.audio, choice.message.tool_calls) == (None, None)
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert engine.heard == (Message("user", (Text("hello"),)),)
    assert not engine.requests[0].speech


def test_usage_tells_what_was_sound_and_what_was_known() -> None:
    usage = ask(FakeEngine(*SPOKEN), **AUDIO).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 27, 34)
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    assert (prompt.audio_tokens, prompt.text_tokens, prompt.cached_tokens) == (3, 4, 2)
    assert (completion.audio_tokens, completion.text_tokens) == (25, 2)


@pytest.mark.parametrize("form", ["WAV", "MP3", "FLAC", "OGG"])
def test_sound_of_any_file_is_heard(form: str) -> None:
    data = sound_file(tone(0.3), form=form)
    content = [{"type": "text", "text": "who?"}, input_audio(data, form.lower())]
    ask(engine := FakeEngine(*WRITTEN), messages=[{"role": "user", "content": content}])
    text, heard = engine.heard[0].content
    assert text == Text("who?")
    assert isinstance(heard, Audio) and abs(len(heard.samples) - 4800) < 200


@pytest.mark.parametrize("form", ["wav", "mp3", "flac", "opus", "pcm16"])
def test_speech_comes_as_a_file_of_the_format_asked_for(form: str) -> None:
    answer = ask(FakeEngine(*SPOKEN), **AUDIO | {"audio": {"voice": "default", "format": form}})
    message = answer.choices[0].message
    assert (message.content, message.audio.transcript) == (None, "Hello")
    data = base64.b64decode(message.audio.data)
    raw = {"samplerate": 24_000, "channels": 1, "subtype": "PCM_16", "format": "RAW"}
    samples, rate_hz = soundfile.read(io.BytesIO(data), **(raw if form == "pcm16" else {}))
    assert (rate_hz, len(samples)) == (24_000, expected_samples(30_000))


def test_a_stream_of_text_has_its_role_first_and_its_finish_last() -> None:
    chunks = chunks_of(FakeEngine(*WRITTEN))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert [delta.content for delta in deltas] == ["", "Hel", "lo", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_a_stream_of_speech_is_in_the_order_of_the_protocol() -> None:
    chunks = chunks_of(FakeEngine(*SPOKEN), **AUDIO, stream_options={"include_usage": True})
    assert all(len(chunk.choices) == 1 for chunk in chunks[:-1])  # never one choice per modality
    parts = audio_parts(chunks)
    roles = [chunk.choices[0].delta.role for chunk in chunks[:-1]]
    assert roles == ["assistant", *[None] * (len(chunks) - 2)]
    assert (parts[0].id[:6], parts[0].transcript) == ("audio_", "Hel")
    assert parts[1].data and not parts[1].transcript  # the sound does not wait for more text
    assert [bool(part.expires_at) for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].model_fields_set == {"expires_at"}
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 34)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_pieces_of_sound_can_be_decoded_one_by_one_and_joined_as_base64() -> None:
    parts = [p.data for p in audio_parts(chunks_of(FakeEngine(*SPOKEN), **AUDIO)) if p.data]
    joined = base64.b64decode("".join(parts), validate=True)
    assert joined == b"".join(base64.b64decode(part) for part in parts)
    assert len(joined) == 2 * expected_samples(30_000)
    assert max(map(len, parts)) <= 32_000  # of one line: readers have limits
    ramp = np.frombuffer(joined, "<i2").astype(int)
    assert np.abs(np.diff(ramp[300:-300])).max() <= 2  # continuous: no seam between the pieces


@pytest.mark.parametrize("form", ["mp3", "opus"])
def test_a_stream_may_be_an_encoded_file(form: str) -> None:
    chunks = chunks_of(FakeEngine(*SPOKEN), **AUDIO | {"audio": {"voice": "alloy", "format": form}})
    data = base64.b64decode("".join(part.data or "" for part in audio_parts(chunks)))
    samples, rate_hz = soundfile.read(io.BytesIO(data))
    assert rate_hz == 24_000 and 0 <= len(samples) - expected_samples(30_000) < 2400


def test_the_helper_of_the_sdk_puts_a_stream_together() -> None:
    with (
        client_of(FakeEngine(*SPOKEN)) as client,
        client.chat.completions.stream(**QUESTION, **AUDIO) as stream,
    ):
        message = stream.get_final_completion().choices[0].message
    audio = message.audio
    assert (audio.transcript, audio.id.count("audio_")) == ("Hello", 1)
    assert len(base64.b64decode(audio.data)) == 2 * expected_samples(30_000)


async def test_the_async_client_streams() -> None:
    with async_client_address(FakeEngine(*SPOKEN)) as arguments:
        async with openai.AsyncOpenAI(**arguments) as client:
            stream = await client.chat.completions.create(**QUESTION, **AUDIO, stream=True)
            parts = audio_parts([chunk async for chunk in stream])
    assert "".join(part.transcript or "" for part in parts) == "Hello"


async def test_a_stream_is_lines_of_data_that_end_with_done() -> None:
    body = json.dumps(QUESTION | AUDIO | {"stream": True})
    response = await call(FakeEngine(*SPOKEN), "POST", PATH, content=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-sample-rate"] == "24000"
    assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == (
        "no-store",
        "no",
    )
    lines = response.text.removesuffix("\n\n").split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-1])


def test_history_by_audio_id_is_what_was_said() -> None:
    with client_of(engine := FakeEngine(*SPOKEN)) as client:
        create = client.chat.completions.create
        first = create(**QUESTION, **AUDIO).choices[0].message
        streamed = audio_parts(list(create(**QUESTION, **AUDIO, stream=True)))[0].id
        by_id: Any = {"role": "assistant", "audio": {"id": streamed}}
        create(model=MODEL, messages=[*HELLO, first, *HELLO, by_id, *HELLO])
    said = Message("assistant", (Text("Hello"),))
    asked = Message("user", (Text("hello"),))
    assert engine.heard == (asked, said, asked, said, asked)


def test_a_reply_of_sound_without_words_is_known_too() -> None:
    with client_of(engine := FakeEngine(sound(3000), WHOLE)) as client:
        message = client.chat.completions.create(**QUESTION, **AUDIO).choices[0].message
        client.chat.completions.create(model=MODEL, messages=[*HELLO, message, *HELLO])
    assert engine.heard[1] == Message("assistant", (Text(""),))


@pytest.mark.parametrize("keep_s", [3600, -1])  # -1: over at once
def test_an_audio_id_that_is_unknown_or_has_expired_is_refused(
    keep_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio_memory, "KEPT_S", keep_s)
    with client_of(FakeEngine(*SPOKEN)) as client:
        message = client.chat.completions.create(**QUESTION, **AUDIO).choices[0].message
        known = {
            "role": "assistant",
            "audio": {"id": message.audio.id if keep_s < 0 else "audio_x"},
        }
        with pytest.raises(openai.BadRequestError) as info:
            client.chat.completions.create(model=MODEL, messages=[*HELLO, known])
    assert info.value.code == ("audio_expired" if keep_s < 0 else "audio_not_found")
    assert info.value.param == "messages[1].audio.id"


def test_the_replies_used_last_are_kept() -> None:
    engine = FakeEngine(*SPOKEN)
    with client_of(engine, keep_texts=2) as client:

        def said(**request: Any) -> Any:
            return client.chat.completions.create(**QUESTION | request).choices[0].message

        first, second = said(**AUDIO), said(**AUDIO)
        said(messages=[*HELLO, first, *HELLO])
        third = said(**AUDIO)
        said(messages=[*HELLO, first, *HELLO, third, *HELLO])
        with pytest.raises(openai.BadRequestError, match="the last 2 spoken replies"):
            said(messages=[*HELLO, second, *HELLO])


def test_a_reply_that_was_cut_is_known_as_far_as_it_went() -> None:
    rest = threading.Event()
    engine = FakeEngine(TextDelta("As far"), sound(9000), rest, *SPOKEN)
    with client_of(engine) as client:
        with client.chat.completions.create(**QUESTION, **AUDIO, stream=True) as stream:
            audio_id = next(iter(stream)).choices[0].delta.audio.id
        assert engine.cancelled.wait(5)
        engine.steps = WRITTEN
        said: Any = {"role": "assistant", "audio": {"id": audio_id}}
        client.chat.completions.create(model=MODEL, messages=[*HELLO, said, *HELLO])
    assert engine.heard[1] == Message("assistant", (Text("As far"),))


def test_who_leaves_before_the_end_of_a_whole_answer_ends_the_turn() -> None:
    engine = FakeEngine(TextDelta("Hel"), threading.Event())
    with client_of(engine) as client, pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(**QUESTION)
    assert engine.cancelled.wait(5)


def test_roles_and_settings_reach_the_engine() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None},
        {"role": "user", "content": "d"},
    ]
    settings = {"temperature": 0.5, "top_p": 0.9, "seed": 5}
    ask(engine := FakeEngine(*WRITTEN), messages=messages, **settings, max_completion_tokens=9)
    assert [(m.role, [c.text for c in m.content]) for m in engine.heard] == [
        ("system", ["be brief"]),
        ("user", ["a", "b"]),
        ("assistant", ["c"]),
        ("user", ["d"]),
    ]
    turn = engine.requests[0]
    assert (turn.temperature, turn.top_p, turn.seed, turn.max_new_tokens) == (0.5, 0.9, 5, 9)


def test_without_a_limit_a_reply_has_that_of_the_server() -> None:
    engine = FakeEngine(*WRITTEN)
    with client_of(engine, talk=TalkConfig(reply_tokens=77)) as client:
        client.chat.completions.create(**QUESTION)
    assert engine.requests[0].max_new_tokens == 77


@pytest.mark.parametrize(
    ("speech", "done", "finish"),
    [
        (False, replace(WHOLE, text_finish="length"), "length"),
        (True, replace(WHOLE, speech_finish="length"), "length"),
        (False, replace(WHOLE, speech_finish="length"), "stop"),
    ],
)
def test_a_reply_that_a_limit_ended_says_so(speech: bool, done: Any, finish: str) -> None:
    request = AUDIO if speech else {}
    assert ask(FakeEngine(TextDelta("a"), done), **request).choices[0].finish_reason == finish


def test_a_function_is_called_and_its_result_goes_back() -> None:
    with client_of(engine := FakeEngine(CALL, WHOLE)) as client:
        first = client.chat.completions.create(**QUESTION, tools=TOOLS)
        check_type(first)
        message, (called,) = first.choices[0].message, first.choices[0].message.tool_calls
        engine.steps = WRITTEN
        result: Any = {"role": "tool", "tool_call_id": called.id, "content": "sunny"}
        client.chat.completions.create(model=MODEL, messages=[*HELLO, message, result], tools=TOOLS)
    assert (first.choices[0].finish_reason, message.content) == ("tool_calls", None)
    assert (called.function.name, called.function.arguments) == (CALL.name, CALL.arguments)
    (tool,) = engine.requests[0].tools
    assert (tool.name, tool.parameters) == ("weather", {"type": "object"})
    assert engine.heard[1:] == (
        Message("assistant", (), (CALL,)),
        Message("tool", (Text("sunny"),)),
    )


@pytest.mark.parametrize("request_", [{}, AUDIO, OPUS])
def test_a_function_call_streams_as_deltas(request_: Any) -> None:
    engine = FakeEngine(CALL, ToolCall("weather", "{}"), WHOLE)
    chunks = chunks_of(engine, tools=TOOLS, **request_)
    calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert [(c.index, c.function.arguments) for c in calls] == [(0, CALL.arguments), (1, "{}")]
    assert len({c.id for c in calls}) == 2
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert audio_parts(chunks) == []


def tool_history(*results: str) -> list[Any]:
    """Two calls, x and y, and results of these ids."""
    function = {"name": "weather", "arguments": "{}"}
    calls = [{"id": i, "type": "function", "function": function} for i in ("x", "y")]
    told = [{"role": "tool", "tool_call_id": i, "content": f"of {i}"} for i in results]
    return [*HELLO, {"role": "assistant", "tool_calls": calls}, *told]


def test_results_stand_in_the_order_of_their_calls() -> None:
    ask(engine := FakeEngine(*WRITTEN), messages=[*tool_history("y", "x"), *HELLO])
    assert [m.content for m in engine.heard[2:4]] == [(Text("of x"),), (Text("of y"),)]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (tool_history("x"), "messages"),
        ([*tool_history("x"), *HELLO], "messages"),
        (tool_history("x", "z"), "messages[3].tool_call_id"),
        (tool_history("x", "x"), "messages[3].tool_call_id"),
        ([*HELLO, {"role": "tool", "content": "a"}], "messages[1].tool_call_id"),
    ],
)
def test_results_that_fit_no_call_are_refused(
    idle: openai.OpenAI, messages: Any, param: str
) -> None:
    assert refused(idle, messages=messages).param == param


def test_with_tool_choice_none_no_function_is_offered() -> None:
    ask(engine := FakeEngine(*WRITTEN), tools=TOOLS, tool_choice="none")
    assert engine.requests[0].tools == ()


NO_PLACE = EngineStatus(
    ready=True, unsupported={"tools": "send no tools", "tool_calls": "send no calls"}
)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"tools": TOOLS}, "tools"),
        ({"tools": TOOLS, "stream": True}, "tools"),
        ({"messages": tool_history("x", "y")}, "messages[1].tool_calls"),
    ],
)
def test_what_the_template_has_no_place_for_is_refused_by_its_field(
    request_: Any, param: str
) -> None:
    with client_of(engine := FakeEngine(*WRITTEN, status=NO_PLACE)) as client:
        error = refused(client, **request_)
    assert isinstance(error, openai.BadRequestError)
    assert (error.param, error.code) == (param, "unsupported_parameter")
    assert "; send no " in error.message
    assert engine.requests == []


@pytest.mark.parametrize(
    "request_", [{"tools": []}, {"tool_choice": "auto"}, {"tools": TOOLS, "tool_choice": "none"}]
)
def test_who_wants_no_function_called_hears_nothing_of_it(request_: Any) -> None:
    ask(engine := FakeEngine(*WRITTEN, status=NO_PLACE), **request_)
    assert engine.requests[0].tools == ()


UNSUPPORTED: dict[str, Any] = {
    "n": 2,
    "stop": ["a"],
    "logprobs": True,
    "top_logprobs": 3,
    "logit_bias": {"50256": -100},
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "response_format": {"type": "json_object"},
    "reasoning_effort": "low",
    "verbosity": "high",
    "prediction": {"type": "content", "content": "a"},
    "parallel_tool_calls": False,
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "web_search_options": {},
    "store": True,
    "service_tier": "priority",
    "prompt_cache_retention": "24h",
}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_the_model_cannot_do_is_refused_by_name(idle: openai.OpenAI, name: str) -> None:
    error = refused(idle, **{name: UNSUPPORTED[name]})
    assert isinstance(error, openai.BadRequestError)
    assert (error.code, error.param) == ("unsupported_parameter", name)


def test_values_that_ask_for_nothing_and_bookkeeping_are_taken() -> None:
    neutral: dict[str, Any] = {
        "n": 1,
        "stop": None,
        "logprobs": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "store": False,
        "user": "u",
        "metadata": {"a": "b"},
        "safety_identifier": "s",
        "service_tier": "auto",
        "stream_options": None,
    }
    assert ask(FakeEngine(*WRITTEN), **neutral).choices[0].message.content == "Hello"


def said(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "a"}]}]}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
TONE = input_audio(sound_file(tone(0.2)))
SPOKEN_SYSTEM = {"role": "system", "content": [input_audio(sound_file(tone(0.2)))]}


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (said(TONE | {"text": "What is it?"}), "messages[0].content[0].text"),
        (said(TONE | {"type": "text", "text": "?"}), "messages[0].content[0].input_audio"),
        (said({"type": "text"}), "messages[0].content[0].text"),
        (said({"type": "input_audio"}), "messages[0].content[0].input_audio"),
        (
            said({"type": "input_audio", "input_audio": TONE["input_audio"] | {"rate": 8000}}),
            "messages[0].content[0].input_audio.rate",
        ),
        ({"messages": [{"role": "function", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "a", "name": "Bob"}]}, "messages[0].name"),
        ({"messages": [SPOKEN_SYSTEM]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [input_audio(b"noise")]}]},
            "messages[0].content[0].input_audio.data",
        ),
        ({"modalities": ["audio"]}, "modalities"),
        ({"modalities": ["text", "image"]}, "modalities[1]"),
        ({"modalities": ["text", "audio"]}, "audio"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "modalities"),
        (AUDIO | {"audio": {"voice": "Bob", "format": "wav"}}, "audio.voice"),
        (AUDIO | {"audio": {"voice": "alloy", "format": "aac"}}, "audio.format"),
        (AUDIO | {"audio": {"voice": "alloy", "format": "wav"}, "stream": True}, "audio.format"),
        (AUDIO | {"audio": {"voice": "alloy", "format": "flac"}, "stream": True}, "audio.format"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"extra_body": {"speech_temperature": 11}}, "speech_temperature"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
    ],
)
def test_a_wrong_field_is_named(idle: openai.OpenAI, request_: Any, param: str) -> None:
    error = refused(idle, **request_)
    assert isinstance(error, openai.BadRequestError)
    assert error.param == param


def test_another_model_is_not_found(idle: openai.OpenAI) -> None:
    error = refused(idle, model="gpt-4o-audio-preview")
    assert isinstance(error, openai.NotFoundError)
    assert (error.code, error.param) == ("model_not_found", "model")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model": "omnispeech"}'])
async def test_a_body_that_is_no_request_is_refused_in_openais_shape(body: bytes) -> None:
    response = await call(FakeEngine(), "POST", PATH, content=body)
    assert response.status_code == 400
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (Overloaded("full"), 503, "overloaded", "1"),
        (TooManyRequests("slower", 7), 429, "rate_limit_exceeded", "7"),
        (PromptTooLong("too long", 9, 8), 400, "context_length_exceeded", None),
        (Unsupported("not this model"), 501, "unsupported", None),
        (GenerationError("the device failed"), 500, None, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_engine_is_a_status_with_its_code(
    error: Exception, status: int, code: str | None, retry_after: str | None, stream: bool
) -> None:
    with client_of(FakeEngine(error)) as client:
        told = refused(client, stream=stream)
    assert (told.status_code, told.code, str(error) in told.message) == (status, code, True)
    assert told.response.headers.get("retry-after") == retry_after


def test_what_can_never_work_is_not_tried_again() -> None:
    engine = FakeEngine(Unsupported("not this model"))
    with (
        client_of(engine) as client,
        pytest.raises(openai.InternalServerError),
    ):
        client.with_options(max_retries=2).chat.completions.create(**QUESTION)
    assert len(engine.requests) == 1


def test_an_error_in_the_middle_of_a_stream_is_raised_by_the_sdk() -> None:
    engine = FakeEngine(TextDelta("Hel"), GenerationError("the device failed"))
    with client_of(engine) as client:
        stream = client.chat.completions.create(**QUESTION, stream=True)
        with pytest.raises(openai.APIError, match="the device failed") as info:
            list(stream)
    assert info.value.type == "server_error"


def test_too_many_messages_and_too_much_text_are_refused() -> None:
    with client_of(FakeEngine(), max_messages=2, max_text_chars=10) as client:
        for messages in (HELLO * 3, [{"role": "user", "content": "a" * 11}]):
            with pytest.raises(openai.BadRequestError, match="send at most"):
                client.chat.completions.create(model=MODEL, messages=messages)


def test_one_turn_does_not_wait_for_another() -> None:
    """Two clients at once on one server; the first is still being answered."""
    gate = threading.Event()
    engine = FakeEngine(TextDelta("a"), gate, replace(WHOLE))
    with serving(engine) as url:
        clients = [openai.OpenAI(base_url=f"{url}/v1", api_key="none") for _ in range(2)]
        streams = [c.chat.completions.create(**QUESTION, stream=True) for c in clients]
        assert [next(iter(s)).choices[0].delta.role for s in streams] == ["assistant"] * 2
        gate.set()
        assert [list(s)[-1].choices[0].finish_reason for s in streams] == ["stop"] * 2
        for client in clients:
            client.close()


@pytest.mark.skipif(not OLD_SDK.is_dir(), reason=f"no openai 3.3.1 in {OLD_SDK}; check.sh puts it")
def test_the_oldest_sdk_works_too() -> None:
    script = Path(__file__).with_name("old_openai.py")
    with serving(FakeEngine(*SPOKEN)) as url:
        heard = subprocess.run(
            [sys.executable, script, url],
            env=os.environ | {"PYTHONPATH": str(OLD_SDK)},
            capture_output=True,
            text=True,
        )
    assert heard.returncode == 0, heard.stderr
    size = 2 * expected_samples(30_000)
    assert json.loads(heard.stdout) == {
        "version": "3.3.1",
        "models": [MODEL],
        "transcript": "Hello",
        "text": "Hello",
        "streamed": "Hello",
        "bytes": size,
        "speech": size,
        "refusal": ["unsupported_parameter", "n"],
    }
