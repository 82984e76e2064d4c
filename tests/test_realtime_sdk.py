"""The official SDK as it is, against a real server; every event held against the SDK's types."""

import asyncio
import base64
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
from fake_engine import DONE as CUT_OFF
from fake_engine import RATE_HZ, FakeEngine, serving
from openai import AsyncOpenAI, OpenAI
from openai.resources.realtime.realtime import AsyncRealtimeConnection, RealtimeConnection
from openai.types.realtime import RealtimeServerEvent
from openai_client import unknown_fields
from pydantic import TypeAdapter
from realtime_order import check_order

from omnispeech.audio.resample import Resampler
from omnispeech.config import TalkConfig
from omnispeech.engine.events import Audio, AudioDelta, SpeechEngine, TextDelta, ToolCall
from omnispeech.errors import GenerationError, Overloaded

ROOT = Path(__file__).parent.parent
FIRST_SDK = Path(sys.prefix) / "openai-3.3.1"
LIMIT_S = 10.0
EVENT: TypeAdapter[Any] = TypeAdapter(RealtimeServerEvent)
# what is told beyond the types, of the old SDK (message) or of both
SESSION = ("id", "object", "expires_at", "temperature", "unsupported")
EXTENSIONS = {f".session.{name}" for name in SESSION} | {".response.status_details.error.message"}
MANUAL: dict[str, Any] = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}

DONE = replace(CUT_OFF, speech_finish="stop")
DELTA = "response.output_audio.delta"
SPOKEN_S = 2.0


def ramp(seconds: float) -> AudioDelta:
    samples = np.arange(int(seconds * RATE_HZ)) % 1000
    return AudioDelta(samples.astype("<i2").tobytes())


SPEECH = (TextDelta("One two "), ramp(1.0), TextDelta("three.", 1.0), ramp(1.0), DONE)
WORDS = (TextDelta("Hello "), TextDelta("there."), DONE)


class Watched:
    """A connection of the SDK; what it is told is checked and kept."""

    def __init__(self, connection: AsyncRealtimeConnection) -> None:
        self.sdk = connection
        self.events: list[Any] = []

    async def next(self) -> Any:
        event = await asyncio.wait_for(self.sdk.recv(), LIMIT_S)
        check_type(event)
        self.events.append(event)
        return event

    async def until(self, kind: str) -> Any:
        while (event := await self.next()).type != kind:
            pass
        return event

    async def reply(self) -> Any:
        return (await self.until("response.done")).response

    async def error(self) -> Any:
        return (await self.until("error")).error

    async def manual(self, **session: Any) -> None:
        await self.sdk.session.update(session=MANUAL | session)
        await self.until("session.updated")

    async def say(self, text: str, item_id: str | None = None) -> Any:
        content = [{"type": "input_text", "text": text}]
        item = {"type": "message", "role": "user", "content": content}
        await self.sdk.conversation.item.create(item=item | ({"id": item_id} if item_id else {}))
        return (await self.until("conversation.item.done")).item

    async def respond(self, **response: Any) -> Any:
        await self.sdk.response.create(response=response)
        return await self.reply()

    def of(self, kind: str) -> list[Any]:
        return [event for event in self.events if event.type == kind]

    def types(self) -> list[str]:
        return [event.type for event in self.events]

    def check(self) -> None:
        check_order([event.model_dump() for event in self.events])


def check_type(event: Any) -> None:
    """The SDK builds its objects without looking at what is in them."""
    fields = event.model_dump(exclude_unset=True)
    read = EVENT.validate_python(fields, strict=True)
    assert type(read) is type(event), fields
    assert set(unknown_fields(event)) <= EXTENSIONS


@asynccontextmanager
async def connected(engine: SpeechEngine, **settings: Any) -> AsyncIterator[Watched]:
    """The order of all events is checked at the end."""
    with serving(engine, **settings) as url:
        async with (
            AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
            client.realtime.connect(model="any") as connection,
        ):
            watched = Watched(connection)
            await watched.until("session.created")
            yield watched
            watched.check()


def sound(seconds: float) -> str:
    """base64 of PCM at 24 kHz"""
    noise = np.random.default_rng(0).integers(-9000, 9000, int(seconds * 24_000))
    return base64.b64encode(noise.astype("<i2").tobytes()).decode()


def question() -> np.ndarray:
    """[N] int16 at 24 kHz: somebody asks something, then is silent."""
    samples, rate_hz = soundfile.read(ROOT / "examples/question.wav", dtype="float32")
    speech = Resampler(rate_hz, 24_000)
    whole = np.concatenate([speech.push(samples), speech.finish(), np.zeros(36_000, np.float32)])
    return (whole * 32767).astype("<i2")


def heard(engine: FakeEngine) -> list[tuple[str, str]]:
    """Sound is a star."""
    return [
        (m.role, "".join("*" if isinstance(part, Audio) else part.text for part in m.content))
        for m in engine.heard
    ]


def played(events: list[Any]) -> int:
    """Samples at 24 kHz"""
    return sum(len(base64.b64decode(event.delta)) for event in events) // 2


async def test_a_turn_that_the_client_commits() -> None:
    engine = FakeEngine(*SPEECH)
    async with connected(engine) as c:
        session = c.events[0].session
        assert session.id.startswith("sess_") and session.object == "realtime.session"
        await c.manual(instructions="Be brief.")
        await c.sdk.input_audio_buffer.append(audio=sound(0.3))
        await c.sdk.input_audio_buffer.append(audio=sound(0.2))
        await c.sdk.input_audio_buffer.commit()
        await c.until("conversation.item.done")
        await c.sdk.response.create()
        response = await c.reply()
        assert response.status == "completed"
        assert response.output[0].content[0].transcript == "One two three."
        assert response.usage.input_tokens == 7
        assert abs(played(c.of(DELTA)) - SPOKEN_S * 24_000) < 50
        assert c.types()[:5] == [
            "session.created",
            "session.updated",
            "input_audio_buffer.committed",
            "conversation.item.added",
            "conversation.item.done",
        ]
    assert heard(engine) == [("system", "Be brief."), ("user", "*")]
    (samples,) = (part.samples for part in engine.heard[1].content if isinstance(part, Audio))
    assert abs(len(samples) - 8000) < 200


async def test_an_event_that_is_missing_would_be_found() -> None:
    async with connected(FakeEngine(*SPEECH)) as c:
        await c.manual()
        await c.say("Hi")
        await c.respond()
    told = [event.model_dump() for event in c.events]
    may_lack = ("session.updated", "response.done")
    for place, event in enumerate(told):
        if event["type"] not in may_lack and not event["type"].endswith(".delta"):
            with pytest.raises((AssertionError, ValueError)):
                check_order(told[:place] + told[place + 1 :])
    with pytest.raises(AssertionError):
        check_order([*told[:-2], told[-1], told[-2]])


async def test_a_turn_whose_end_the_server_hears() -> None:
    engine = FakeEngine(*SPEECH)
    async with connected(engine) as c:
        for piece in np.array_split(question(), 100):
            await c.sdk.input_audio_buffer.append(audio=base64.b64encode(piece.tobytes()).decode())
        assert (await c.reply()).status == "completed"
        kinds = c.types()
        assert kinds[1:7] == [
            "input_audio_buffer.speech_started",
            "input_audio_buffer.speech_stopped",
            "input_audio_buffer.committed",
            "conversation.item.added",
            "conversation.item.done",
            "response.created",
        ]
        started, stopped = c.events[1], c.events[2]
        assert started.audio_start_ms < 600
        assert 1000 < stopped.audio_end_ms - started.audio_start_ms < len(question()) / 24
    assert heard(engine) == [("user", "*")]


async def test_speech_stops_a_reply() -> None:
    go_on = threading.Event()
    engine = FakeEngine(TextDelta("One two three "), ramp(2.0), go_on, TextDelta("four."), DONE)
    async with connected(engine) as c:
        await c.manual()
        await c.say("hello")
        await c.sdk.response.create()
        await c.until(DELTA)
        vad = {"type": "realtime", "audio": {"input": {"turn_detection": {"type": "server_vad"}}}}
        await c.sdk.session.update(session=vad)
        await c.until("session.updated")
        pcm = base64.b64encode(question()[:48_000].tobytes()).decode()
        await c.sdk.input_audio_buffer.append(audio=pcm)
        response = await c.reply()
        assert response.status == "cancelled"
        assert response.status_details.reason == "turn_detected"
        cut = await c.until("conversation.item.truncated")
        assert 0 < cut.audio_end_ms <= 2000
    assert engine.cancelled.wait(5)


async def test_a_reply_in_text_alone() -> None:
    engine = FakeEngine(*WORDS)
    async with connected(engine) as c:
        await c.manual(output_modalities=["text"])
        await c.say("Hi")
        response = await c.respond()
        assert response.output_modalities == ["text"]
        assert response.output[0].content[0].text == "Hello there."
        assert [event.delta for event in c.of("response.output_text.delta")] == ["Hello ", "there."]
        assert not c.of(DELTA)
    assert not engine.requests[-1].speech


async def test_the_model_remembers_the_turns_before() -> None:
    engine = FakeEngine(*SPEECH)
    async with connected(engine) as c:
        await c.manual(instructions="Be brief.")
        for turn in range(3):
            await c.say(f"turn {turn}")
            await c.respond()
    reply = ("assistant", "One two three.")
    said = [("user", f"turn {turn}") for turn in range(3)]
    assert heard(engine) == [("system", "Be brief."), said[0], reply, said[1], reply, said[2]]


async def test_items_are_made_read_cut_and_deleted() -> None:
    engine = FakeEngine(*SPEECH)
    async with connected(engine) as c:
        await c.manual()
        item = c.sdk.conversation.item
        content = [{"type": "input_audio", "audio": sound(0.5), "transcript": "la"}]
        await item.create(
            item={"id": "mine", "type": "message", "role": "user", "content": content}
        )
        await c.until("conversation.item.done")
        await item.retrieve(item_id="mine")
        part = (await c.until("conversation.item.retrieved")).item.content[0]
        assert (part.transcript, len(base64.b64decode(part.audio))) == ("la", 24_000)
        reply = (await c.respond()).output[0]
        await item.truncate(item_id=reply.id, content_index=0, audio_end_ms=99_000)
        assert (await c.until("conversation.item.truncated")).audio_end_ms == 2000
        await item.truncate(item_id=reply.id, content_index=0, audio_end_ms=0)
        assert (await c.until("conversation.item.truncated")).audio_end_ms == 0
        await item.retrieve(item_id=reply.id)
        assert (await c.until("conversation.item.retrieved")).item.content[0].transcript == ""
        await item.create(
            item={
                "type": "message",
                "role": "system",
                "content": [{"type": "input_text", "text": "Be kind."}],
            },
            previous_item_id="root",
        )
        assert (await c.until("conversation.item.added")).previous_item_id is None
        await item.delete(item_id="mine")
        assert (await c.until("conversation.item.deleted")).item_id == "mine"
        await c.say("Hi")
        await c.respond()
    assert heard(engine) == [("system", "Be kind."), ("user", "Hi")]


async def test_a_response_may_have_its_own_wishes() -> None:
    engine = FakeEngine(*SPEECH)
    async with connected(engine) as c:
        await c.manual(instructions="Be brief.")
        known = await c.say("Hi")
        engine.steps = WORDS
        response = await c.respond(
            conversation="none",
            instructions="Sing.",
            output_modalities=["text"],
            max_output_tokens=9,
            metadata={"topic": "song"},
            input=[
                {"type": "item_reference", "id": known.id},
                {
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "now"}],
                },
            ],
        )
        assert (response.conversation_id, response.metadata) == (None, {"topic": "song"})
        assert response.max_output_tokens == 9
        assert heard(engine) == [("system", "Sing."), ("user", "Hi"), ("user", "now")]
        assert engine.requests[-1].max_new_tokens == 9
        engine.steps = SPEECH
        response = await c.respond(instructions="Shout.")
        assert response.conversation_id and response.metadata is None
        assert heard(engine) == [("system", "Shout."), ("user", "Hi")]
        await c.respond()
        assert heard(engine)[0] == ("system", "Be brief.")
        assert len(heard(engine)) == 3


async def test_a_response_is_cancelled() -> None:
    never = threading.Event()
    engine = FakeEngine(TextDelta("One two three "), ramp(1.0), never)
    async with connected(engine) as c:
        await c.manual()
        await c.say("Hi")
        await c.sdk.response.create()
        await c.until(DELTA)
        await c.sdk.response.cancel()
        response = await c.reply()
        assert response.status == "cancelled"
        assert response.status_details.reason == "client_cancelled"
        await c.sdk.response.cancel(event_id="again")
        error = await c.error()
        assert (error.code, error.event_id) == ("response_cancel_not_active", "again")
    assert engine.cancelled.wait(5)


async def test_an_update_merges() -> None:
    async with connected(FakeEngine()) as c:
        await c.manual(instructions="Be brief.")
        await c.sdk.session.update(
            session={
                "type": "realtime",
                "max_output_tokens": 12,
                "audio": {
                    "input": {"format": {"type": "audio/pcmu"}},
                    "output": {"format": {"type": "audio/pcma"}, "voice": "marin"},
                },
            }
        )
        session = (await c.until("session.updated")).session
        assert (session.instructions, session.max_output_tokens) == ("Be brief.", 12)
        assert session.audio.input.turn_detection is None
        assert session.audio.input.format.type == "audio/pcmu"
        assert session.audio.output.format.type == "audio/pcma"
        assert session.audio.output.voice == "default"
        wish: Any = {"type": "realtime", "instructions": None, "tools": []}
        await c.sdk.session.update(session=wish)
        assert (await c.until("session.updated")).session.instructions == ""


@pytest.mark.parametrize("form", ["audio/pcmu", "audio/pcma"])
async def test_a_turn_of_a_telephone(form: Any) -> None:
    engine = FakeEngine(*SPEECH)
    async with connected(engine) as c:
        await c.manual()
        both = {"format": {"type": form}}
        await c.sdk.session.update(
            session={"type": "realtime", "audio": {"input": both, "output": both}}
        )
        await c.until("session.updated")
        second = base64.b64encode(bytes([0x55] * 8000)).decode()
        await c.sdk.input_audio_buffer.append(audio=second)
        await c.sdk.input_audio_buffer.commit()
        await c.until("conversation.item.done")
        await c.respond()
        told = sum(len(base64.b64decode(event.delta)) for event in c.of(DELTA))
        assert abs(told - SPOKEN_S * 8000) < 20
    (samples,) = (part.samples for part in engine.heard[0].content if isinstance(part, Audio))
    assert abs(len(samples) - 16_000) < 200


async def test_no_refusal_ends_the_session() -> None:
    engine = FakeEngine(*SPEECH)
    async with connected(engine) as c:
        sdk, item = c.sdk, c.sdk.conversation.item
        await c.manual()
        wishes: list[tuple[Any, str, str | None]] = [
            (sdk.input_audio_buffer.commit, "input_audio_buffer_commit_empty", None),
            (sdk.response.cancel, "response_cancel_not_active", None),
            (sdk.response.create, "conversation_empty", None),
            (sdk.output_audio_buffer.clear, "unsupported", "type"),
            (lambda **k: sdk.input_audio_buffer.append(audio="?", **k), "invalid_value", "audio"),
            (
                lambda **k: item.retrieve(item_id="x", **k),
                "item_retrieve_invalid_item_id",
                "item_id",
            ),
            (lambda **k: item.delete(item_id="x", **k), "item_delete_invalid_item_id", "item_id"),
            (
                lambda **k: item.truncate(item_id="x", content_index=0, audio_end_ms=0, **k),
                "item_truncate_invalid_item_id",
                "item_id",
            ),
            (lambda **k: item.create(item={}, **k), "missing_required_parameter", "item.type"),
            (
                lambda **k: sdk.response.create(response={"conversation": "x"}, **k),
                "invalid_value",
                "response.conversation",
            ),
            (
                lambda **k: sdk.session.update(
                    session=MANUAL | {"tracing": {"group_id": "g"}}, **k
                ),
                "unsupported",
                "session.tracing",
            ),
        ]
        for number, (wish, code, param) in enumerate(wishes):
            await wish(event_id=f"wish_{number}")
            error = await c.error()
            assert (error.code, error.param) == (code, param)
            assert (error.type, error.event_id) == ("invalid_request_error", f"wish_{number}")
        for raw in ("{", "[]", '{"type": "song.sing"}'):
            await sdk.send_raw(raw)
            assert (await c.error()).type == "invalid_request_error"
        await c.say("Hi")
        assert (await c.respond()).status == "completed"


async def test_a_second_response_is_refused_while_one_is_active() -> None:
    go_on = threading.Event()
    async with connected(FakeEngine(TextDelta("Hi"), ramp(0.5), go_on, DONE)) as c:
        await c.manual()
        await c.say("Hi")
        await c.sdk.response.create()
        await c.until(DELTA)
        await c.sdk.response.create(event_id="second")
        error = await c.error()
        assert error.code == "conversation_already_has_active_response"
        assert error.event_id == "second"
        go_on.set()
        assert (await c.reply()).status == "completed"


@pytest.mark.parametrize(
    ("steps", "end"),
    [(WORDS, "completed"), ((GenerationError("broken"),), "failed")],
)
async def test_what_users_say_is_written_down_on_request(steps: Any, end: str) -> None:
    kind = f"conversation.item.input_audio_transcription.{end}"
    async with connected(FakeEngine(*steps), talk=TalkConfig(transcription="model")) as c:
        await c.manual()
        wish: Any = {"transcription": {"model": "gpt-4o-mini-transcribe"}}
        await c.sdk.session.update(session={"type": "realtime", "audio": {"input": wish}})
        assert (await c.until("session.updated")).session.audio.input.transcription.model
        await c.sdk.input_audio_buffer.append(audio=sound(0.5))
        await c.sdk.input_audio_buffer.commit()
        told = await c.until(kind)
        assert told.item_id == c.of("conversation.item.done")[0].item.id
        if end == "completed":
            assert told.transcript == "Hello there."


@pytest.mark.parametrize(
    ("failure", "code"),
    [(GenerationError("broken"), "generation_failed"), (Overloaded("full"), "server_overloaded")],
)
async def test_a_response_that_fails_says_why(failure: Exception, code: str) -> None:
    engine = FakeEngine(failure)
    async with connected(engine) as c:
        await c.manual()
        await c.say("Hi")
        response = await c.respond()
        assert response.status == "failed"
        assert response.status_details.error.code == code
        engine.steps = SPEECH
        assert (await c.respond()).status == "completed"


async def test_a_reply_that_a_limit_ends_says_so() -> None:
    async with connected(FakeEngine(TextDelta("One two"), ramp(1.0), CUT_OFF)) as c:
        await c.manual()
        await c.say("Hi")
        response = await c.respond()
        assert response.status == "incomplete"
        assert response.status_details.reason == "max_output_tokens"
        assert response.output[0].status == "incomplete"


async def test_the_model_calls_a_function() -> None:
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
    engine = FakeEngine(TextDelta("Let me see."), ToolCall("weather", '{"town": "Bonn"}'), DONE)
    async with connected(engine) as c:
        await c.manual(output_modalities=["text"], tools=[tool])
        await c.say("What is the weather in Bonn?")
        response = await c.respond()
        call = response.output[1]
        assert (call.type, call.name) == ("function_call", "weather")
        assert call.arguments == '{"town": "Bonn"}'
        (done,) = c.of("response.function_call_arguments.done")
        assert (done.call_id, done.arguments) == (call.call_id, call.arguments)
        engine.steps = (TextDelta("It rains."), DONE)
        await c.sdk.conversation.item.create(
            item={"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        )
        response = await c.respond(tool_choice="none")
        assert response.output[0].content[0].text == "It rains."
    assert [tool.name for tool in engine.requests[0].tools] == ["weather"]
    assert engine.requests[1].tools == ()
    assert heard(engine)[1:] == [("assistant", "Let me see."), ("tool", "rain")]
    assert engine.heard[1].tool_calls[0].name == "weather"


@pytest.fixture
def worker() -> Iterator[SpeechEngine]:
    """A small real model."""
    from golden_models import golden_worker

    with golden_worker(kv_tokens=4096, context_length=300) as one:
        yield one


async def test_a_real_worker_talks_and_remembers(worker: SpeechEngine) -> None:
    async with connected(worker) as c:
        await c.manual(max_output_tokens=12, instructions="Be brief.")
        cached = []
        for _ in range(2):
            await c.sdk.input_audio_buffer.append(audio=sound(0.5))
            await c.sdk.input_audio_buffer.commit()
            await c.until("conversation.item.done")
            response = await c.respond()
            assert response.output[0].content[0].transcript
            details = response.usage.input_token_details
            assert details.audio_tokens > 0
            cached.append(details.cached_tokens)
        assert cached[0] + 20 < cached[1]  # what the turn before has read
        response = await c.respond(output_modalities=["text"])
        assert response.usage.output_token_details.audio_tokens == 0
        assert played(c.of(DELTA)) > 12_000


@pytest.mark.parametrize(
    "truncation", ["auto", {"type": "retention_ratio", "retention_ratio": 0.5}]
)
async def test_a_long_talk_goes_on_in_a_real_worker_without_its_begin(
    worker: SpeechEngine, truncation: Any
) -> None:
    async with connected(worker) as c:
        await c.manual(output_modalities=["text"], max_output_tokens=4, truncation=truncation)
        reused = []
        for _ in range(8):
            await c.say("one two three " * 3)
            response = await c.respond()
            assert response.status in ("completed", "incomplete")
            usage = response.usage
            reused.append(usage.input_token_details.cached_tokens / usage.input_tokens)
        assert max(reused[6:]) > 0.5  # the oldest turns went before; what is left is read once
        await c.sdk.session.update(session=MANUAL | {"truncation": "disabled"})
        for _ in range(8):
            await c.say("one two three " * 3)
            response = await c.respond()
        assert response.status == "failed"
        assert response.status_details.error.code == "context_length_exceeded"


async def test_handlers_of_the_sdk_are_called() -> None:
    seen = []
    with serving(FakeEngine(*SPEECH)) as url:
        async with (
            AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
            client.realtime.connect(model="any") as connection,
        ):

            @connection.on("session.created")
            async def begin(event: Any) -> None:
                await connection.session.update(session=MANUAL)
                item = {"type": "message", "role": "user"}
                content = [{"type": "input_text", "text": "Hi"}]
                await connection.conversation.item.create(item=item | {"content": content})
                await connection.response.create()

            @connection.on("response.output_audio_transcript.done")
            def note(event: Any) -> None:
                seen.append(event.transcript)

            @connection.on("response.done")
            async def end(event: Any) -> None:
                await connection.close()

            await asyncio.wait_for(connection.dispatch_events(), LIMIT_S)
    assert seen == ["One two three."]


async def test_the_sdk_comes_back_to_its_conversation() -> None:
    engine = FakeEngine(*WORDS)
    session_ids: list[str] = []

    def resume(event: Any) -> Any:
        return {"extra_query": {"resume": session_ids[0]}}

    with serving(engine) as url:
        async with (
            AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
            client.realtime.connect(
                model="any", on_reconnecting=resume, initial_delay=0.01
            ) as connection,
        ):
            async with asyncio.timeout(LIMIT_S):
                async for event in connection:
                    if event.type == "session.created":
                        session_ids.append(event.session.id)
                        content = [{"type": "input_text", "text": f"{len(session_ids)}"}]
                        item = {"type": "message", "role": "user", "content": content}
                        await connection.conversation.item.create(item=item)
                    elif event.type == "conversation.item.done" and len(session_ids) == 1:
                        connection._connection.transport.abort()
                    elif event.type == "conversation.item.done":
                        break
                wish = {"output_modalities": ["text"]}
                await connection.response.create(response=wish)
                while (await connection.recv()).type != "response.done":
                    pass
    assert session_ids[0] == session_ids[1]
    assert heard(engine) == [("user", "1"), ("user", "2")]


# the newest websockets would rather be opened otherwise by the SDK
@pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager")
def test_turns_with_the_client_that_waits() -> None:
    engine = FakeEngine(*SPEECH)
    with (
        serving(engine) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none") as client,
        client.realtime.connect(model="any") as connection,
    ):
        alarm = threading.Timer(LIMIT_S, connection.close)
        alarm.start()
        events = [connection.recv()]
        connection.session.update(session=MANUAL)
        for _ in range(2):
            connection.input_audio_buffer.append(audio=sound(0.5))
            connection.input_audio_buffer.commit()
            connection.response.create()
            events += until_done(connection)
        connection.conversation.item.retrieve(item_id="x")
        events.append(connection.recv())
        alarm.cancel()
    for event in events:
        check_type(event)
    check_order([event.model_dump() for event in events])
    assert events[-1].error.code == "item_retrieve_invalid_item_id"
    assert heard(engine) == [("user", "*"), ("assistant", "One two three."), ("user", "*")]


def until_done(connection: RealtimeConnection) -> list[Any]:
    events = []
    for event in connection:
        events.append(event)
        if event.type == "response.done":
            return events
    raise AssertionError("the connection ended")


@pytest.mark.skipif(openai.__version__ == "3.3.1", reason="this is the run with it")
@pytest.mark.skipif(
    not FIRST_SDK.is_dir(),
    reason=f"openai 3.3.1 is not in {FIRST_SDK}: pip install --target there, without dependencies",
)
def test_all_this_holds_with_the_oldest_sdk_that_is_promised() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-k", "not worker", __file__]
    environment = os.environ | {"PYTHONPATH": str(FIRST_SDK)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout[-4000:]
