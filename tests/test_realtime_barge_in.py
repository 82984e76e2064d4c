"""Somebody speaks while a reply is under way."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_engine import DONE, RATE_HZ, FakeEngine, sound
from realtime_client import MANUAL, Loudness, RealtimeClient, noise, silence, talking

from omnispeech.engine.events import Event, TextDelta, TurnRequest

WHOLE = replace(DONE, speech_finish="stop")
STOP = (TextDelta("Fine."), sound(500), WHOLE)
QUESTION = np.concatenate([noise(0.5), silence(1.0)])


@pytest.fixture(autouse=True)
def loudness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnispeech.server.realtime.hearing.hearing.SpeechDetector", Loudness)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


class Talkative(FakeEngine):
    """Its first reply never ends by itself: a word and half a second of sound, over and over."""

    def __init__(self, every_s: float = 0.002) -> None:
        super().__init__(*STOP)
        self._every_s = every_s
        self.made_s = 0.0

    async def answer(self, request: TurnRequest) -> AsyncGenerator[Event, None]:
        if self.requests:
            async with aclosing(super().answer(request)) as events:
                async for event in events:
                    yield event
            return
        self.requests.append(request)
        try:
            while True:
                yield TextDelta("again ", self.made_s)
                yield sound(RATE_HZ // 2)
                self.made_s += 0.5
                await asyncio.sleep(self._every_s)
        finally:
            self.cancelled.set()


def detection(**fields: Any) -> dict[str, Any]:
    return {"audio": {"input": {"turn_detection": {"type": "server_vad", **fields}}}}


async def interrupted(client: RealtimeClient, deltas: int = 5) -> list[dict[str, Any]]:
    """All that is told from the moment on in which the server hears the interruption."""
    await client.append(QUESTION)
    for _ in range(deltas):
        await client.until("response.output_audio.delta")
    await client.append(noise(0.3))
    await client.until("input_audio_buffer.speech_started")
    at = len(client.got)
    await client.until("conversation.item.truncated")
    return client.got[at:]


async def test_no_delta_follows_the_begin_of_speech() -> None:
    async with talking(Talkative()) as client:
        await client.begin()
        told = await interrupted(client)
        await client.append(silence(1.0))
        await client.until("response.created")
    kinds = [event["type"] for event in told]
    assert kinds == [
        "response.output_audio.done",
        "response.output_audio_transcript.done",
        "response.content_part.done",
        "conversation.item.done",
        "response.output_item.done",
        "response.done",
        "conversation.item.truncated",
    ]
    after = client.got[client.got.index(told[-1]) :]
    assert not [event for event in after if event["type"].endswith("delta")]


async def test_the_reply_ends_as_cancelled_by_the_turn() -> None:
    async with talking(Talkative()) as client:
        await client.begin()
        *_, done, _ = await interrupted(client)
    response = done["response"]
    assert response["status"] == "cancelled"
    assert response["status_details"] == {"type": "cancelled", "reason": "turn_detected"}
    assert response["output"][0]["status"] == "incomplete"


async def test_the_engine_is_let_go_at_once() -> None:
    engine = Talkative(every_s=0.05)
    async with talking(engine) as client:
        await client.begin()
        await interrupted(client, deltas=2)
        assert engine.cancelled.wait(0.5)
        metrics = await client.metrics()
    assert "omnispeech_barge_ins_total 1.0" in metrics
    assert "omnispeech_stop_latency_seconds_count 1.0" in metrics


async def test_what_was_not_sent_is_not_remembered() -> None:
    engine = Talkative(every_s=0.02)
    async with talking(engine) as client:
        await client.begin()
        *_, cut = await interrupted(client)
        sent_ms = len(client.sound()) / 24
        await client.append(silence(1.0))
        await client.until("response.done")
    assert cut["audio_end_ms"] == pytest.approx(sent_ms, abs=1)
    _, reply, _ = engine.heard
    (text,) = reply.content
    assert 0 < len(text.text) < len(client.transcript())
    assert "again again again".startswith(text.text[:17])


async def test_a_client_that_reads_slowly_gets_nothing_of_what_it_interrupted() -> None:
    engine = Talkative(every_s=0.0)
    async with talking(engine, max_queue=4) as client:
        await client.begin()
        await client.append(QUESTION)
        await client.until("response.output_audio.delta")
        while engine.made_s < 300:  # far more than the socket takes
            await asyncio.sleep(0.01)
        await client.append(noise(0.3))
        await asyncio.to_thread(engine.cancelled.wait, 5)
        cut = await client.until("conversation.item.truncated")
    kinds = client.types()
    started = len(kinds) - kinds[::-1].index("input_audio_buffer.speech_started")
    assert "response.output_audio.delta" not in kinds[started:]
    assert cut["audio_end_ms"] == pytest.approx(len(client.sound()) / 24, abs=1)
    assert cut["audio_end_ms"] < 1000 * engine.made_s - 10_000


async def test_a_reply_made_whole_is_still_stopped_where_it_was_not_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("omnispeech.server.realtime.replies.answers.REPLY_ROOM", 10**9)
    minutes = [sound(RATE_HZ * 10) for _ in range(30)]
    engine = FakeEngine(TextDelta("A long story."), *minutes, WHOLE)
    async with talking(engine, max_queue=4) as client:
        await client.begin()
        await client.append(QUESTION)
        await client.until("response.output_audio.delta")
        await asyncio.sleep(1.0)
        engine.steps = STOP
        await client.append(noise(0.3))
        await asyncio.sleep(0.3)
        cut = await client.until("conversation.item.truncated")
    (done,) = client.of("response.done")
    assert done["response"]["status"] == "cancelled"
    assert cut["audio_end_ms"] == pytest.approx(len(client.sound()) / 24, abs=1)


async def test_the_client_may_say_that_less_was_played() -> None:
    engine = Talkative()
    async with talking(engine) as client:
        await client.begin()
        *_, cut = await interrupted(client)
        place = {"item_id": cut["item_id"], "content_index": 0}
        for asked, told in ((10**6, cut["audio_end_ms"]), (600, 600), (900, 600), (0, 0)):
            await client.send("conversation.item.truncate", **place, audio_end_ms=asked)
            event = await client.until("conversation.item.truncated")
            assert event["audio_end_ms"] == told
        await client.append(silence(1.0))
        await client.until("response.done")
    assert [message.role for message in engine.heard] == ["user", "user"]
    assert "error" not in client.types()


async def test_after_a_wrong_truncation_the_talk_goes_on() -> None:
    async with talking(FakeEngine(*STOP)) as client:
        await client.begin()
        place = {"content_index": 0, "audio_end_ms": 0}
        await client.send("conversation.item.truncate", item_id="unknown", **place)
        assert (await client.error())["code"] == "item_truncate_invalid_item_id"
        await client.append(QUESTION)
        assert (await client.until("response.done"))["response"]["status"] == "completed"


async def test_speech_before_the_first_sound_stops_a_reply_without_items(
    gate: threading.Event,
) -> None:
    engine = FakeEngine(gate, *STOP)
    async with talking(engine) as client:
        await client.begin()
        await client.append(QUESTION)
        await client.until("response.created")
        await client.append(noise(0.3))
        response = (await client.until("response.done"))["response"]
        assert (response["status"], response["output"]) == ("cancelled", [])
        engine.steps = STOP
        await client.append(silence(1.0))
        assert (await client.until("response.done"))["response"]["status"] == "completed"
    assert [message.role for message in engine.heard] == ["user", "user"]


async def test_a_cough_that_is_no_turn_leaves_the_talk_able_to_answer() -> None:
    """The reply is stopped; the turn after it is answered as any other."""
    engine = Talkative()
    async with talking(engine) as client:
        await client.begin()
        await interrupted(client)
        await client.send("input_audio_buffer.clear")
        await client.until("input_audio_buffer.cleared")
        await client.append(QUESTION)
        assert (await client.until("response.done"))["response"]["status"] == "completed"


async def test_without_interrupt_response_the_turn_is_answered_after_the_reply(
    gate: threading.Event,
) -> None:
    engine = FakeEngine(TextDelta("first "), sound(500), gate, TextDelta("reply"), WHOLE)
    async with talking(engine) as client:
        await client.begin(**detection(interrupt_response=False))
        await client.append(QUESTION)
        await client.until("response.output_audio.delta")
        await client.append(QUESTION)
        await client.until("input_audio_buffer.committed")
        engine.steps = STOP
        gate.set()
        first = (await client.until("response.done"))["response"]
        second = (await client.until("response.done"))["response"]
    assert [first["status"], second["status"]] == ["completed", "completed"]
    assert client.transcript() == "first replyFine."
    assert len(engine.requests) == 2
    assert sorted(message.role for message in engine.heard) == ["assistant", "user", "user"]


async def test_a_text_reply_is_cut_to_the_text_that_was_sent(gate: threading.Event) -> None:
    engine = FakeEngine(TextDelta("One, "), gate, TextDelta("two."), WHOLE)
    async with talking(engine) as client:
        await client.begin(**detection(), output_modalities=["text"])
        await client.append(QUESTION)
        await client.until("response.output_text.delta")
        await client.append(noise(0.3))
        response = (await client.until("response.done"))["response"]
    assert response["output"][0]["content"] == [{"type": "output_text", "text": "One, "}]
    assert "conversation.item.truncated" not in client.types()


async def test_out_of_band_replies_are_not_interrupted(gate: threading.Event) -> None:
    engine = FakeEngine(TextDelta("aside"), gate, WHOLE)
    async with talking(engine) as client:
        await client.begin(**MANUAL)
        await client.say()
        await client.send("response.create", response={"conversation": "none"})
        await client.until("response.output_audio_transcript.delta")
        await client.send("session.update", session=detection(create_response=False))
        await client.append(noise(0.3))
        await client.until("input_audio_buffer.speech_started")
        gate.set()
        assert (await client.until("response.done"))["response"]["status"] == "completed"
