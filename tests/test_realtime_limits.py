"""What a live conversation may take, and how it ends."""

import asyncio
import gc
import logging
import signal
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from controller_server import worker_on_loopback
from fake_engine import DONE, FakeEngine, serving, sound
from realtime_client import (
    MANUAL,
    Loudness,
    RealtimeClient,
    connected,
    encoded,
    noise,
    silence,
    talking,
)
from websockets.exceptions import ConnectionClosed

from omnispeech.audio.formats import PCM_24K
from omnispeech.config import TalkConfig
from omnispeech.engine.events import EngineStatus, TextDelta
from omnispeech.server.realtime.hearing.input_audio import InputAudio
from omnispeech.server.realtime.idle_timer import IdleTimer

WHOLE = replace(DONE, speech_finish="stop")
STOP = (TextDelta("Fine."), sound(500), WHOLE)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture(autouse=True)
def loudness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnispeech.server.realtime.hearing.hearing.SpeechDetector", Loudness)


async def test_a_full_server_says_so_and_takes_the_next_when_one_has_left() -> None:
    with serving(FakeEngine(), TalkConfig(max_talks=1)) as url:
        async with connected(url) as client:
            await client.begin()
            async with connected(url) as late:
                code, reason = await late.closed()
            assert code == 1013 and "max_talks" in reason and late.got == []
        while await client.talks():
            await asyncio.sleep(0.005)
        async with connected(url) as client:
            await client.begin()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (EngineStatus(ready=False), "being loaded"),
        (EngineStatus(ready=False, failure="no weights " * 50), "no weights"),
    ],
)
async def test_a_server_that_is_not_ready_says_so(status: EngineStatus, said: str) -> None:
    async with talking(FakeEngine(status=status)) as client:
        code, reason = await client.closed()
    assert code == 1013 and said in reason and len(reason) <= 123


async def test_a_talk_in_which_nobody_speaks_ends() -> None:
    async with talking(FakeEngine(), TalkConfig(talk_idle_s=1.0)) as client:
        await client.begin()
        with suppress(ConnectionClosed):
            for _ in range(15):
                await client.append(silence(0.5))  # that a microphone is on is no speech
                await asyncio.sleep(0.2)
            pytest.fail("the talk goes on")
        code, reason = await client.closed()
        metrics = await client.metrics()
    assert code == 1000 and "talk_idle_s" in reason
    assert 'omnispeech_talks_closed_total{reason="idle"} 1.0' in metrics


async def test_listening_to_a_reply_is_no_silence() -> None:
    engine = FakeEngine(TextDelta("Fine."), sound(22_050 * 3 // 2), WHOLE)
    async with talking(engine, TalkConfig(talk_idle_s=1.0)) as client:
        await client.begin(**MANUAL)
        await client.say()
        await client.reply()
        replied_s = time.monotonic()
        assert (await client.closed())[0] == 1000
    assert time.monotonic() - replied_s > 2.4


async def test_a_model_that_breaks_each_silence_does_not_keep_a_talk_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at = IdleTimer.at
    monkeypatch.setattr(IdleTimer, "at", lambda timer, time_s: at(timer, time_s - 4.9))
    engine = FakeEngine(*STOP)
    async with talking(engine, TalkConfig(talk_idle_s=1.0)) as client:
        detection = {"type": "server_vad", "idle_timeout_ms": 5000}
        await client.begin(audio={"input": {"turn_detection": detection}})
        await client.append(np.concatenate([noise(0.5), silence(1.0)]))
        assert (await client.closed())[0] == 1000
    assert 2 <= client.types().count("input_audio_buffer.timeout_triggered") < 20


async def test_a_talk_with_a_reply_under_way_is_not_silent(gate: threading.Event) -> None:
    engine = FakeEngine(TextDelta("so "), gate, *STOP)
    async with talking(engine, TalkConfig(talk_idle_s=1.0)) as client:
        await client.begin(**MANUAL)
        await client.say()
        await client.send("response.create")
        await asyncio.sleep(1.5)
        gate.set()
        assert (await client.until("response.done"))["response"]["status"] == "completed"
        assert (await client.closed())[0] == 1000


async def test_a_talk_ends_after_its_longest_time(gate: threading.Event) -> None:
    engine = FakeEngine(TextDelta("so "), gate, *STOP)
    async with talking(engine, TalkConfig(max_talk_s=1.0)) as client:
        await client.begin(**MANUAL)
        await client.say()
        await client.send("response.create")
        code, reason = await client.closed()
        assert code == 1000 and "max_talk_s" in reason
        assert engine.cancelled.wait(3)
    (done,) = client.of("response.done")
    assert done["response"]["status_details"]["error"]["code"] == "session_ended"


async def test_a_full_input_buffer_keeps_what_it_has() -> None:
    engine = FakeEngine(*STOP)
    async with talking(engine, max_audio_s=2.0) as client:
        await client.begin(**MANUAL)
        await client.append(noise(2.0))
        await client.append(noise(2.0))
        assert "at most" in (await client.error())["message"]
        await client.send("input_audio_buffer.commit")
        await client.until("conversation.item.done")
        await client.reply()
    (message,) = engine.heard
    assert len(message.content[0].samples) == pytest.approx(32_000, abs=200)


async def test_a_turn_of_the_client_is_no_longer_than_a_sound_may_be() -> None:
    async with talking(FakeEngine(*STOP), max_audio_s=2.0) as client:
        await client.begin(**MANUAL)
        await client.append(noise(2.1))
        assert "2.1 s; at most 2 s" in (await client.error())["message"]


async def test_what_a_full_conversation_refuses_is_not_told_as_committed() -> None:
    async with talking(FakeEngine(*STOP), max_messages=1) as client:
        await client.begin(**MANUAL)
        await client.say()
        await client.append(noise(0.3))
        await client.send("input_audio_buffer.commit")
        assert (await client.error())["code"] == "conversation_full"
    assert client.types().count("input_audio_buffer.committed") == 1


async def test_a_commit_that_is_refused_keeps_the_sound() -> None:
    engine = FakeEngine(*STOP)
    async with talking(engine, max_messages=1) as client:
        await client.begin(**MANUAL)
        item = await client.say()
        await client.append(noise(0.5))
        await client.send("input_audio_buffer.commit")
        assert (await client.error())["code"] == "conversation_full"
        await client.send("conversation.item.delete", item_id=item["id"])
        await client.append(noise(0.5))
        await client.send("input_audio_buffer.commit")
        await client.until("conversation.item.done")
        await client.reply()
    (message,) = engine.heard
    np.testing.assert_allclose(message.content[0].samples, at_16_khz(noise(0.5), 2), atol=1e-4)


def at_16_khz(samples: np.ndarray, times: int) -> np.ndarray:
    """[N] 24 kHz, again and again, as the server hears it."""
    audio = InputAudio(PCM_24K, max_s=60.0)
    for _ in range(times):
        audio.append(b64decode(encoded(samples)))
    return audio.held()


async def test_a_turn_that_finds_no_room_is_answered_by_a_reply_that_failed() -> None:
    engine = FakeEngine(*STOP)
    async with talking(engine, TalkConfig(speculate_ms=0), max_messages=1) as client:
        await client.begin()
        text = {"type": "input_text", "text": "Hello."}
        item = {"type": "message", "role": "user", "content": [text]}
        await client.send("conversation.item.create", item=item)
        for number in range(2):
            await client.append(np.concatenate([noise(0.5), silence(1.0)]))
            response = (await client.until("response.done"))["response"]
            assert response["status_details"]["error"]["code"] == "conversation_full", number
        await client.sync()
    assert engine.requests == [] and not client.of("input_audio_buffer.committed")
    assert len(client.of("error")) == 1  # that of sync


async def test_a_talk_holds_so_much_sound() -> None:
    engine = FakeEngine(*STOP)
    async with talking(engine, TalkConfig(talk_audio_s=1.0), max_audio_s=1.0) as client:
        await client.begin(**MANUAL)
        await client.say(0.6)
        await client.append(noise(0.6))
        await client.send("input_audio_buffer.commit")
        error = await client.error()
    assert error["code"] == "conversation_full" and "1 s (talk_audio_s)" in error["message"]


async def test_a_speaker_without_pause_is_answered_at_the_longest_turn() -> None:
    async with talking(FakeEngine(*STOP), max_audio_s=2.0) as client:
        await client.begin()
        await client.append(noise(5.0))
        stopped = await client.until("input_audio_buffer.speech_stopped")
        await client.until("response.created")
    assert stopped["audio_end_ms"] == pytest.approx(2000, abs=100)


async def test_hours_of_silence_take_no_memory() -> None:
    async with talking(FakeEngine(*STOP), max_audio_s=2.0) as client:
        await client.begin()
        for _ in range(20):
            await client.append(silence(5.0))
        await client.sync()
    assert "error" in client.types()[-1] and len(client.got) == 2


async def test_when_the_server_stops_silent_talks_are_told_and_replies_finished(
    gate: threading.Event,
) -> None:
    engine = FakeEngine(TextDelta("Hel"), gate, TextDelta("lo"), sound(500), WHOLE)
    with worker_on_loopback(engine) as worker:
        async with connected(worker.url) as silent, connected(worker.url) as busy:
            await silent.begin()
            await spoken_to(busy)
            worker.http.handle_exit(signal.SIGTERM, None)
            code, reason = await silent.closed()
            assert code == 1012 and "stopping" in reason
            async with connected(worker.url) as late:
                assert (await late.closed())[0] == 1012
            gate.set()
            assert (await busy.until("response.done"))["response"]["status"] == "completed"
            assert (await busy.closed())[0] == 1012
        assert worker.ended(within_s=5)


async def test_a_reply_over_the_time_of_a_stop_is_told_to_be_cut(gate: threading.Event) -> None:
    engine = FakeEngine(TextDelta("Hel"), gate, WHOLE)
    with worker_on_loopback(engine, drain_s=0.3) as worker:
        async with connected(worker.url) as client:
            await spoken_to(client)
            worker.http.handle_exit(signal.SIGTERM, None)
            response = (await client.until("response.done"))["response"]
            assert response["status_details"]["error"]["code"] == "server_unavailable"
            assert (await client.closed())[0] == 1012
        assert worker.ended(within_s=5)


async def test_a_stop_does_not_wait_for_lost_talks() -> None:
    with worker_on_loopback(FakeEngine(*STOP)) as worker:
        async with connected(worker.url) as client:
            await client.begin(**MANUAL)
            await client.lose()
        worker.http.handle_exit(signal.SIGTERM, None)
        assert worker.ended(within_s=3)


async def spoken_to(client: RealtimeClient) -> None:
    """Its reply is under way."""
    await client.begin(**MANUAL)
    await client.say()
    await client.send("response.create")
    await client.until("response.output_audio_transcript.delta")


LEAVES = {
    "before anything": [],
    "with speech begun": [noise(0.5)],
    "with a long sound being listened to": [noise(60.0)],
    "with an answer begun in a pause": [noise(0.5), silence(0.4)],
    "in the middle of a reply": [noise(0.5), silence(1.0)],
}


@pytest.mark.parametrize("resume_s", [0.0, 30.0])
@pytest.mark.parametrize("sounds", LEAVES.values(), ids=LEAVES.keys())
async def test_whoever_is_lost_leaves_no_turn_and_no_word_in_the_log(
    sounds: list[np.ndarray], resume_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()
    engine = FakeEngine(TextDelta("Hel"), sound(500), gate, WHOLE)
    with worker_on_loopback(engine, TalkConfig(resume_s=resume_s)) as worker:
        async with connected(worker.url) as client:
            await client.begin()
            for part in sounds:
                await client.append(part)
            await asyncio.sleep(0.1)
            await client.lose()
        async with connected(worker.url) as client:
            await client.begin()
            while 'omnispeech_talks{state="connected"} 1.0' not in await client.metrics():
                await asyncio.sleep(0.02)
        assert engine.cancelled.is_set() == bool(engine.requests)
        assert warnings(caplog) == []


async def test_whoever_leaves_while_the_door_opens_leaves_no_word_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with worker_on_loopback(FakeEngine(*STOP)) as worker:
        for _ in range(20):
            async with connected(worker.url) as client:
                client.socket.transport.abort()
        async with connected(worker.url) as client:
            await client.begin()
        assert warnings(caplog) == []


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of the server so far; asyncio tells of a task's error when the task is forgotten."""
    gc.collect()
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_reply_that_is_whole_is_sent_to_its_end_before_the_server_closes() -> None:
    minutes = [sound(22_050 * 10) for _ in range(30)]
    with worker_on_loopback(FakeEngine(TextDelta("Long."), *minutes, WHOLE)) as worker:
        async with connected(worker.url, max_queue=4) as client:
            await client.begin(**MANUAL)
            await client.say()
            await client.send("response.create")
            await client.until("response.output_audio.delta")
            worker.http.handle_exit(signal.SIGTERM, None)
            await asyncio.sleep(1.0)
            assert (await client.closed())[0] == 1012
    (done,) = client.of("response.done")
    assert done["response"]["status"] == "completed"
    assert len(client.sound()) == pytest.approx(300 * 24_000, abs=2)
