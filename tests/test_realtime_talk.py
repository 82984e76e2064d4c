"""Turns of a live conversation, told event by event."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_engine import DONE, PLAIN, RATE_HZ, FakeEngine, serving, sound
from realtime_client import MANUAL, Loudness, connected, noise, silence, talking

from omnispeech.audio.formats import PCM_24K
from omnispeech.config import TalkConfig
from omnispeech.engine.events import (
    Audio,
    AudioDelta,
    Event,
    Text,
    TextDelta,
    ToolCall,
    TurnRequest,
)
from omnispeech.errors import GenerationError, Overloaded, PromptTooLong, Unauthorized
from omnispeech.server.realtime.conversation import Conversation
from omnispeech.server.realtime.idle_timer import IdleTimer
from omnispeech.server.realtime.items.items import Items, Limits
from omnispeech.server.realtime.outbox import Outbox
from omnispeech.server.realtime.replies.output_audio import OutputAudio
from omnispeech.server.realtime.replies.response import Response
from omnispeech.server.realtime.settings.session_settings import SessionSettings

WHOLE = replace(DONE, speech_finish="stop")
STOP = (TextDelta("Hel"), sound(500), TextDelta("lo"), sound(300, 500), WHOLE)
COMMITTED = [
    "input_audio_buffer.committed",
    "conversation.item.added",
    "conversation.item.done",
]
BEGUN = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
]
ENDED = [
    "response.content_part.done",
    "conversation.item.done",
    "response.output_item.done",
    "response.done",
]
WRITTEN_DOWN = {"audio": {"input": {"transcription": {"model": "any"}}}}
SPOKEN = ["response.output_audio.done", "response.output_audio_transcript.done"]


@pytest.fixture(autouse=True)
def loudness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnispeech.server.realtime.hearing.hearing.SpeechDetector", Loudness)


@pytest.fixture
def gate() -> Any:
    event = threading.Event()
    yield event
    event.set()


def vad(**fields: Any) -> dict[str, Any]:
    detection = {"type": "server_vad", **fields}
    return {"audio": {"input": {"turn_detection": detection}}}


def without_deltas(types: list[str]) -> list[str]:
    return [kind for kind in types if not kind.endswith(".delta")]


async def test_a_manual_turn_is_told_in_the_order_of_the_protocol() -> None:
    async with talking(FakeEngine(*STOP)) as client:
        await client.begin(**MANUAL)
        await client.say()
        await client.reply()
    told = without_deltas(client.types())
    assert told == ["session.created", "session.updated", *COMMITTED, *BEGUN, *SPOKEN, *ENDED]


async def test_text_and_sound_are_told_as_they_are_made() -> None:
    async with talking(FakeEngine(*STOP)) as client:
        await client.begin(**MANUAL)
        await client.say()
        await client.reply()
    kinds = [kind.split("_")[-1] for kind in client.types() if kind.endswith(".delta")]
    assert kinds[:4] == ["transcript.delta", "audio.delta", "transcript.delta", "audio.delta"]
    assert client.transcript() == "Hello"
    assert len(client.sound()) == pytest.approx(800 * 24_000 / RATE_HZ, abs=2)


async def test_every_event_has_an_id_and_names_its_response() -> None:
    async with talking(FakeEngine(*STOP)) as client:
        await client.begin(**MANUAL)
        await client.say()
        response = await client.reply()
    assert len({event["event_id"] for event in client.got}) == len(client.got)
    deltas = client.of("response.output_audio.delta")
    (item,) = response["output"]
    for event in deltas:
        assert event["response_id"] == response["id"] and event["item_id"] == item["id"]
        assert (event["output_index"], event["content_index"]) == (0, 0)
    assert item["content"] == [{"type": "output_audio", "transcript": "Hello"}]
    assert (item["status"], item["role"], item["object"]) == (
        "completed",
        "assistant",
        "realtime.item",
    )


async def test_usage_says_what_was_read_and_made() -> None:
    done = replace(WHOLE, prompt_tokens=70, audio_tokens=50, cached_tokens=20)
    async with talking(FakeEngine(TextDelta("a"), sound(50), done)) as client:
        await client.begin(**MANUAL)
        await client.say()
        response = await client.reply()
    assert response["usage"] == {
        "total_tokens": 97,
        "input_tokens": 70,
        "output_tokens": 27,
        "input_token_details": {
            "text_tokens": 20,
            "audio_tokens": 50,
            "image_tokens": 0,
            "cached_tokens": 20,
        },
        "output_token_details": {"text_tokens": 2, "audio_tokens": 25},
    }
    assert (response["status"], response["status_details"]) == ("completed", None)


async def test_what_was_said_and_answered_is_read_in_the_next_turn() -> None:
    engine = FakeEngine(*STOP)
    async with talking(engine) as client:
        await client.begin(**MANUAL, instructions="Be brief.")
        for _ in range(3):
            await client.say(0.5)
            await client.reply()
    system, *turns = engine.heard
    assert system.content == (Text("Be brief."),)
    assert [message.role for message in turns] == ["user", "assistant"] * 2 + ["user"]
    assert turns[1].content == (Text("Hello"),)
    (spoken,) = turns[0].content
    assert isinstance(spoken, Audio) and len(spoken.samples) == 8000


async def test_a_text_reply_has_no_sound() -> None:
    engine = FakeEngine(TextDelta("Hel"), TextDelta("lo"), WHOLE)
    async with talking(engine) as client:
        await client.begin(**MANUAL, output_modalities=["text"])
        await client.say()
        response = await client.reply()
    assert not engine.requests[-1].speech
    told = without_deltas(client.types())[5:]
    assert told == [*BEGUN, "response.output_text.done", *ENDED]
    assert client.of("response.output_text.done")[0]["text"] == "Hello"
    assert client.of("response.content_part.added")[0]["part"] == {"type": "text", "text": ""}
    assert response["output"][0]["content"] == [{"type": "output_text", "text": "Hello"}]


async def test_a_reply_that_a_limit_ended_is_incomplete() -> None:
    async with talking(FakeEngine(*PLAIN)) as client:
        await client.begin(**MANUAL)
        await client.say()
        response = await client.reply()
    assert response["status"] == "incomplete"
    assert response["status_details"]["reason"] == "max_output_tokens"
    assert response["output"][0]["status"] == "incomplete"


async def test_a_reply_that_failed_says_why_and_the_next_one_is_spoken() -> None:
    engine = FakeEngine(TextDelta("Hel"), GenerationError("the device is gone"))
    async with talking(engine) as client:
        await client.begin(**MANUAL)
        await client.say()
        response = await client.reply()
        engine.steps = STOP
        assert (await client.reply())["status"] == "completed"
    assert response["status"] == "failed"
    assert response["status_details"]["error"] == {
        "type": "server_error",
        "code": "generation_failed",
        "message": "the device is gone",
    }
    assert "error" not in client.types()


async def test_a_full_engine_fails_the_reply_and_not_the_talk() -> None:
    async with talking(FakeEngine(Overloaded("all places are taken"))) as client:
        await client.begin(**MANUAL)
        await client.say()
        response = await client.reply()
        assert response["status_details"]["error"]["code"] == "server_overloaded"
        assert response["output"] == []
        await client.send("input_audio_buffer.clear")
        await client.until("input_audio_buffer.cleared")


async def test_a_defect_of_the_server_is_told_without_its_inside() -> None:
    async with talking(FakeEngine(ZeroDivisionError("secret"))) as client:
        await client.begin(**MANUAL)
        await client.say()
        response = await client.reply()
    assert response["status"] == "failed"
    assert "secret" not in str(client.got)


async def test_a_call_of_a_function_is_an_item_of_its_own() -> None:
    engine = FakeEngine(ToolCall("weather", '{"city": "Kiel"}'), WHOLE)
    async with talking(engine) as client:
        tool = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
        await client.begin(**MANUAL, output_modalities=["text"], tools=[tool])
        await client.say()
        response = await client.reply()
        (call,) = response["output"]
        done = client.of("response.function_call_arguments.done")[0]
        assert (done["name"], done["arguments"]) == ("weather", '{"city": "Kiel"}')
        assert (done["item_id"], done["call_id"]) == (call["id"], call["call_id"])
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
        await client.send("conversation.item.create", item=result)
        engine.steps = (TextDelta("It rains."), WHOLE)
        await client.reply()
    assert [tool.name for tool in engine.requests[0].tools] == ["weather"]
    *_, asked, given = engine.heard
    assert asked.tool_calls == (ToolCall("weather", '{"city": "Kiel"}'),)
    assert (given.role, given.content) == ("tool", (Text("rain"),))


async def test_the_sound_is_one_stream_without_headers_or_seams() -> None:
    tones = (0.5 * np.sin(np.arange(RATE_HZ) / 9) * 32767).astype("<i2")
    pieces = [AudioDelta(part.tobytes()) for part in np.array_split(tones, 37)]
    async with talking(FakeEngine(TextDelta("a"), *pieces, WHOLE)) as client:
        await client.begin(**MANUAL)
        await client.say()
        await client.reply()
    whole = OutputAudio(RATE_HZ, PCM_24K)
    expected = b"".join([*whole.push(tones.tobytes()), *whole.finish()])
    assert client.sound().tobytes() == expected


@pytest.mark.parametrize("parallel", [True, False])
async def test_of_several_calls_the_first_counts_where_one_is_wanted(parallel: bool) -> None:
    engine = FakeEngine(ToolCall("a", "{}"), ToolCall("b", "{}"), WHOLE)
    async with talking(engine) as client:
        await client.begin(**MANUAL, parallel_tool_calls=parallel, output_modalities=["text"])
        await client.say()
        response = await client.reply()
    assert [call["name"] for call in response["output"]] == (["a", "b"] if parallel else ["a"])


async def test_a_call_that_was_told_is_ended_though_the_reply_is_cancelled() -> None:
    """Its last events still wait for a slow client: they are not taken back."""
    told: list[str] = []
    socket: Any = SimpleNamespace(send_text=lambda text: kept(told, text))
    outbox = Outbox(socket)
    conversation = Conversation(SessionSettings(), Items(Limits()), outbox)
    settings = conversation.settings.for_turn()
    response = Response(conversation, settings, RATE_HZ, lambda response: None)
    response.take(ToolCall("f", "{}"))
    assert response.stop("client_cancelled")
    outbox.close()
    await outbox.run()
    assert told[-3:] == ["conversation.item.done", "response.output_item.done", "response.done"]


async def kept(told: list[str], text: str) -> None:
    told.append(json.loads(text)["type"])


async def test_a_key_that_was_taken_away_ends_the_talk() -> None:
    async with talking(FakeEngine(Unauthorized("the key is not known any more"))) as client:
        await client.begin(**MANUAL)
        await client.say()
        assert (await client.reply())["status"] == "failed"
        assert (await client.closed())[0] == 1008


async def test_a_second_reply_is_refused_while_one_is_active(gate: threading.Event) -> None:
    async with talking(FakeEngine(TextDelta("Hel"), gate, WHOLE)) as client:
        await client.begin(**MANUAL)
        await client.say()
        await client.send("response.create")
        await client.until("response.output_audio_transcript.delta")
        await client.send("response.create", event_id="mine")
        error = await client.error()
        assert error["code"] == "conversation_already_has_active_response"
        assert error["event_id"] == "mine"
        gate.set()
        assert (await client.until("response.done"))["response"]["status"] == "completed"
    assert len(client.of("response.created")) == 1


async def test_a_cancelled_reply_ends_at_once_and_frees_the_engine(gate: threading.Event) -> None:
    engine = FakeEngine(TextDelta("Hello "), sound(500), gate, TextDelta("you"), WHOLE)
    async with talking(engine) as client:
        await client.begin(**MANUAL)
        await client.say()
        await client.send("response.create")
        await client.until("response.output_audio.delta")
        await client.send("response.cancel")
        response = (await client.until("response.done"))["response"]
        assert engine.cancelled.wait(3)
        engine.steps = STOP
        assert (await client.reply())["status"] == "completed"
    assert response["status"] == "cancelled"
    assert response["status_details"] == {"type": "cancelled", "reason": "client_cancelled"}
    assert response["output"][0]["status"] == "incomplete"
    assert "you" not in client.transcript()


async def test_cancelling_nothing_is_an_error_of_its_own() -> None:
    async with talking(FakeEngine(*STOP)) as client:
        await client.begin(**MANUAL)
        await client.send("response.cancel", event_id="a")
        assert (await client.error())["code"] == "response_cancel_not_active"
        await client.send("response.cancel", response_id="resp_unknown")
        assert (await client.error())["code"] == "response_cancel_not_active"


async def test_a_reply_out_of_band_leaves_no_trace_and_runs_beside(gate: threading.Event) -> None:
    engine = FakeEngine(TextDelta("one"), gate, WHOLE)
    async with talking(engine) as client:
        await client.begin(**MANUAL)
        await client.say()
        await client.send("response.create")
        await client.until("response.output_audio_transcript.delta")
        engine.steps = (TextDelta("beside"), WHOLE)
        question = {"type": "message", "role": "user"}
        question["content"] = [{"type": "input_text", "text": "What is this about?"}]
        beside = await client.reply(
            conversation="none",
            output_modalities=["text"],
            input=[question],
            metadata={"topic": "x"},
            instructions="Classify.",
        )
        gate.set()
        own = (await client.until("response.done"))["response"]
    assert (beside["metadata"], beside["conversation_id"]) == ({"topic": "x"}, None)
    assert own["conversation_id"] and own["id"] != beside["id"]
    assert [len(message.content) for message in engine.requests[1].messages] == [1, 1]
    (added,) = [
        event["item"]["id"]
        for event in client.of("conversation.item.added")
        if event["item"]["role"] == "assistant"
    ]
    assert added == own["output"][0]["id"]


async def test_replies_out_of_band_are_few_at_a_time(gate: threading.Event) -> None:
    async with talking(FakeEngine(gate, WHOLE)) as client:
        await client.begin(**MANUAL)
        await client.say()
        for _ in range(5):
            await client.send("response.create", response={"conversation": "none"})
        assert (await client.error())["code"] == "too_many_responses"
        gate.set()
        for _ in range(4):
            await client.until("response.done")


class Forgetful(FakeEngine):
    """Its context holds three messages."""

    async def answer(self, request: TurnRequest) -> AsyncGenerator[Event, None]:
        if len(request.messages) > 3:
            self.requests.append(request)
            raise PromptTooLong("too long", positions=100 * len(request.messages), room=300)
        async for event in super().answer(request):
            yield event


async def test_a_conversation_that_is_too_long_loses_its_oldest_turns() -> None:
    engine = Forgetful(*STOP)
    async with talking(engine) as client:
        await client.begin(**MANUAL)
        for _ in range(4):
            await client.say()
            assert (await client.reply())["status"] == "completed"
    assert [message.role for message in engine.heard] == ["user", "assistant", "user"]


async def test_without_truncation_a_long_conversation_fails_with_its_code() -> None:
    engine = FakeEngine(PromptTooLong("too long", positions=900, room=300))
    async with talking(engine) as client:
        await client.begin(**MANUAL, truncation="disabled")
        await client.say()
        response = await client.reply()
    assert response["status_details"]["error"]["code"] == "context_length_exceeded"
    assert [request.can_shorten for request in engine.requests] == [False]


async def test_what_cannot_be_shortened_is_answered_in_the_room_there_is() -> None:
    class Tight(FakeEngine):
        async def answer(self, request: TurnRequest) -> AsyncGenerator[Event, None]:
            if request.can_shorten:
                self.requests.append(request)
                raise PromptTooLong("too long", positions=900, room=600)
            async for event in super().answer(request):
                yield event

    engine = Tight(*STOP)
    async with talking(engine) as client:
        await client.begin(**MANUAL)
        await client.say()
        assert (await client.reply())["status"] == "completed"
    assert [request.can_shorten for request in engine.requests] == [True, False]


async def test_nothing_to_answer_is_refused() -> None:
    async with talking(FakeEngine(*STOP)) as client:
        await client.begin(**MANUAL)
        await client.send("response.create")
        assert (await client.error())["code"] == "conversation_empty"
        assert (await client.reply(instructions="Greet me."))["status"] == "completed"
        await client.send("response.create", response={"input": []})
        error = await client.error()
    assert error["code"] == "conversation_empty" and "response.input is empty" in error["message"]
    assert error["param"] == "response.input"


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\0\0", "invalid_event"),
        ("{", "invalid_json"),
        ("[]", "invalid_event"),
        ('{"type": "nonsense"}', "unknown_event"),
        ('{"type": "input_audio_buffer.append"}', "missing_required_parameter"),
        ('{"type": "input_audio_buffer.append", "audio": "&"}', "invalid_value"),
        ('{"type": "input_audio_buffer.commit"}', "input_audio_buffer_commit_empty"),
        ('{"type": "conversation.item.delete", "item_id": "x"}', "item_delete_invalid_item_id"),
    ],
)
async def test_what_cannot_be_done_is_an_error_and_the_talk_goes_on(
    frame: str | bytes, code: str
) -> None:
    async with talking(FakeEngine(*STOP)) as client:
        await client.begin(**MANUAL)
        await client.socket.send(frame)
        assert (await client.error())["code"] == code
        await client.say()
        assert (await client.reply())["status"] == "completed"


async def test_the_first_event_is_the_session_with_the_name_of_the_model() -> None:
    with serving(FakeEngine(), model_name="mine") as url:
        async with connected(url, "?model=gpt-realtime") as client:
            event = await client.next()
    assert (event["type"], event["session"]["model"]) == ("session.created", "mine")


async def test_the_subprotocol_of_browsers_is_chosen() -> None:
    offered = ["realtime", "openai-beta.realtime-v1"]
    with serving(FakeEngine()) as url:
        async with connected(url, subprotocols=offered) as client:
            assert client.socket.subprotocol == "realtime"
        async with connected(url) as client:
            assert client.socket.subprotocol is None


@pytest.mark.parametrize("query", ["?intent=transcription", "?call_id=rtc_1"])
async def test_what_is_no_conversation_is_refused_at_the_door(query: str) -> None:
    async with talking(FakeEngine(), query=query) as client:
        code, reason = await client.closed()
    assert code == 1008 and "leave it out" in reason


# server VAD


async def test_a_detected_turn_is_committed_under_its_id_and_answered() -> None:
    engine = FakeEngine(*STOP)
    async with talking(engine) as client:
        await client.begin()
        await client.append(np.concatenate([silence(0.6), noise(1.0), silence(1.0)]))
        await client.until("response.done")
    spoken = ["input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped"]
    told = without_deltas(client.types())
    assert told == ["session.created", *spoken, *COMMITTED, *BEGUN, *SPOKEN, *ENDED]
    started, stopped, committed, added = client.got[1:5]
    ids = {started["item_id"], stopped["item_id"], committed["item_id"], added["item"]["id"]}
    assert len(ids) == 1
    assert started["audio_start_ms"] == pytest.approx(300, abs=64)
    (message,) = engine.heard
    seconds = len(message.content[0].samples) / 16_000
    assert seconds == pytest.approx((stopped["audio_end_ms"] - started["audio_start_ms"]) / 1000)
    assert 1.4 < seconds < 1.6


async def test_a_long_append_may_hold_several_turns() -> None:
    turn = [noise(0.5), silence(1.0)]
    async with talking(FakeEngine(*STOP)) as client:
        await client.begin()
        await client.append(np.concatenate(turn * 3))
        for _ in range(3):
            await client.until("input_audio_buffer.committed")
        assert len(client.of("input_audio_buffer.speech_started")) == 3


async def test_without_create_response_a_turn_is_only_committed() -> None:
    engine = FakeEngine(*STOP)
    async with talking(engine) as client:
        await client.begin(**vad(create_response=False))
        await client.append(np.concatenate([noise(0.5), silence(1.0)]))
        await client.until("conversation.item.done")
        assert engine.requests == []
        assert (await client.reply())["status"] == "completed"


async def test_a_turn_that_the_client_has_answered_is_not_answered_again(
    gate: threading.Event,
) -> None:
    """The turn ended during a reply; the client asks before the engine has let go of that one."""

    class Slow(FakeEngine):
        async def answer(self, request: TurnRequest) -> AsyncGenerator[Event, None]:
            first = not self.requests
            async for event in super().answer(request):
                yield event
            while first and not letting_go.is_set():
                await asyncio.sleep(0.002)

    letting_go = threading.Event()
    engine = Slow(TextDelta("Hi"), gate, WHOLE)
    async with talking(engine) as client:
        await client.begin(**vad(interrupt_response=False))
        await client.send("response.create", response={"instructions": "Greet me."})
        await client.until("response.created")
        await client.append(np.concatenate([noise(0.5), silence(1.0)]))
        await client.until("conversation.item.done")
        gate.set()
        await client.until("response.done")
        await client.send("response.create")
        await client.until("response.created")
        letting_go.set()
        await client.until("response.done")
        await client.sync()
    assert len(client.of("response.created")) == 2


async def test_an_answer_is_begun_in_the_pause_and_told_at_the_end_of_the_turn() -> None:
    engine = FakeEngine(*STOP)
    async with talking(engine) as client:
        await client.begin(**vad(silence_duration_ms=1000))
        await client.append(np.concatenate([noise(0.5), silence(0.5)]))
        await client.sync()
        assert len(engine.requests) == 1
        assert "response.created" not in client.types()
        await client.append(silence(1.0))
        await client.until("response.done")
    assert len(engine.requests) == 1
    assert client.transcript() == "Hello"


async def test_the_answer_of_the_pause_has_heard_what_is_committed() -> None:
    engine = FakeEngine(*STOP)
    async with talking(engine) as client:
        await client.begin(**vad(silence_duration_ms=1000))
        await client.append(np.concatenate([noise(0.5), silence(1.5)]))
        await client.until("response.done")
        metrics = await client.metrics()
        await client.reply()
    assert 'omnispeech_speculations_total{outcome="used"} 1.0' in metrics
    begun, again = (request.messages[0].content[0].samples for request in engine.requests)
    np.testing.assert_array_equal(begun, again)


async def test_an_answer_of_a_pause_is_thrown_away_when_speech_goes_on(
    gate: threading.Event,
) -> None:
    engine = FakeEngine(TextDelta("unheard"), gate, WHOLE)
    async with talking(engine) as client:
        await client.begin(**vad(silence_duration_ms=800))
        await client.append(np.concatenate([noise(0.5), silence(0.4)]))
        await client.sync()
        assert len(engine.requests) == 1
        engine.steps = STOP
        await client.append(np.concatenate([noise(0.5), silence(1.2)]))
        await client.until("response.done")
        metrics = await client.metrics()
    assert engine.cancelled.is_set()
    assert "unheard" not in str(client.got)
    assert len(client.of("response.created")) == 1
    assert 'omnispeech_speculations_total{outcome="thrown_away"} 1.0' in metrics
    (message,) = engine.heard
    assert len(message.content[0].samples) > 1.2 * 16_000


async def test_a_full_engine_is_asked_again_at_the_end_of_the_turn() -> None:
    engine = FakeEngine(Overloaded("all places are taken"))
    async with talking(engine) as client:
        await client.begin(**vad(silence_duration_ms=1000))
        await client.append(np.concatenate([noise(0.5), silence(0.5)]))
        await client.sync()
        assert len(engine.requests) == 1
        engine.steps = STOP
        await client.append(silence(1.0))
        assert (await client.until("response.done"))["response"]["status"] == "completed"
    assert len(engine.requests) == 2


@pytest.mark.parametrize("setting", [{"create_response": False}, {"silence_duration_ms": 150}])
async def test_no_answer_is_begun_in_a_pause_where_none_is_due(setting: dict[str, Any]) -> None:
    engine = FakeEngine(*STOP)
    async with talking(engine) as client:
        await client.begin(**vad(**setting))
        await client.append(np.concatenate([noise(0.5), silence(0.1)]))
        await client.sync()
        assert engine.requests == []


async def test_an_answer_begun_in_a_pause_shortens_a_conversation_that_is_too_long() -> None:
    """Pause and end come at once here: the engine has not refused it yet when it is committed."""
    engine = Forgetful(*STOP)
    async with talking(engine, TalkConfig(speculate_ms=200)) as client:
        await client.begin(**vad(silence_duration_ms=300))
        for _ in range(4):
            await client.append(np.concatenate([silence(0.1), noise(0.4), silence(0.9)]))
            response = (await client.until("response.done"))["response"]
            assert response["status"] == "completed", response["status_details"]
    assert [message.role for message in engine.heard] == ["user", "assistant", "user"]


async def test_a_change_of_the_conversation_voids_what_was_begun_in_the_pause() -> None:
    engine = FakeEngine(*STOP)
    async with talking(engine) as client:
        await client.begin(**vad(silence_duration_ms=1000))
        await client.append(np.concatenate([noise(0.5), silence(0.5)]))
        await client.sync()
        await client.send("session.update", session={"instructions": "Be brief."})
        await client.until("session.updated")
        await client.append(silence(1.0))
        await client.until("response.done")
    assert [len(request.messages) for request in engine.requests] == [1, 2]


async def test_the_model_speaks_by_itself_after_a_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    at = IdleTimer.at
    monkeypatch.setattr(IdleTimer, "at", lambda timer, time_s: at(timer, time_s - 4.9))
    engine = FakeEngine(TextDelta("Hello"), sound(RATE_HZ // 2), WHOLE)
    async with talking(engine) as client:
        await client.begin(**vad(idle_timeout_ms=5000))
        await client.append(np.concatenate([noise(0.5), silence(1.0)]))
        await client.until("response.done")
        replied_s = time.monotonic()
        event = await client.until("input_audio_buffer.timeout_triggered")
        assert 0.5 < time.monotonic() - replied_s < 2  # the reply is heard first
        committed = await client.until("input_audio_buffer.committed")
        await client.until("response.done")
    assert event["item_id"] == committed["item_id"]
    assert event["audio_end_ms"] - event["audio_start_ms"] == 300
    assert [message.role for message in engine.heard] == ["user", "assistant", "user"]


async def test_what_is_said_is_written_down_beside_the_talk() -> None:
    engine = FakeEngine(TextDelta("Hello "), TextDelta("there"), WHOLE)
    async with talking(engine, TalkConfig(transcription="model")) as client:
        await client.begin(**vad(create_response=False))
        await client.send("session.update", session=WRITTEN_DOWN)
        await client.append(np.concatenate([noise(0.5), silence(1.0)]))
        done = await client.until("conversation.item.input_audio_transcription.completed")
        assert (done["transcript"], done["content_index"]) == ("Hello there", 0)
        assert done["item_id"] == client.of("input_audio_buffer.committed")[0]["item_id"]
        assert done["usage"]["type"] == "duration"
        await client.send("conversation.item.retrieve", item_id=done["item_id"])
        item = (await client.until("conversation.item.retrieved"))["item"]
    assert item["content"][0]["transcript"] == "Hello there"


async def test_a_transcript_that_failed_is_told_and_the_turn_is_answered() -> None:
    class Failing(FakeEngine):
        async def answer(self, request: TurnRequest) -> AsyncGenerator[Event, None]:
            if request.temperature == 0.0:
                raise Overloaded("all places are taken")
            async for event in super().answer(request):
                yield event

    async with talking(Failing(*STOP), TalkConfig(transcription="model")) as client:
        await client.begin(**MANUAL)
        await client.send("session.update", session=WRITTEN_DOWN)
        await client.say()
        assert (await client.reply())["status"] == "completed"
        await client.sync()
    (failed,) = client.of("conversation.item.input_audio_transcription.failed")
    assert failed["error"]["code"] == "server_overloaded"
