"""A conversation whose connection was lost, and taken up again."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import DONE, FakeEngine, serving, sound
from realtime_client import MANUAL, Loudness, RealtimeClient, connected, noise, silence

from omnispeech.config import AccessConfig, TalkConfig
from omnispeech.engine.events import TextDelta

WHOLE = replace(DONE, speech_finish="stop")
STOP = (TextDelta("Fine."), sound(500), WHOLE)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def resume(session: dict[str, Any]) -> str:
    return f"?model=any&resume={session['id']}"


async def begun(client: RealtimeClient) -> dict[str, Any]:
    """A conversation of one turn."""
    session = await client.begin(**MANUAL, instructions="Be brief.")
    await client.say()
    await client.reply()
    return session


async def test_a_lost_conversation_goes_on_with_its_items_and_settings() -> None:
    engine = FakeEngine(*STOP)
    with serving(engine) as url:
        async with connected(url) as client:
            session = await begun(client)
            await client.lose()
        async with connected(url, resume(session)) as client:
            resumed = await client.begin()
            assert (resumed["id"], resumed["resumed"]) == (session["id"], True)
            assert resumed["instructions"] == "Be brief."
            assert resumed["audio"]["input"]["turn_detection"] is None
            await client.say()
            assert (await client.reply())["status"] == "completed"
    assert [message.role for message in engine.heard] == ["system", "user", "assistant", "user"]


async def test_a_new_session_does_not_say_it_was_resumed() -> None:
    with serving(FakeEngine()) as url:
        async with connected(url) as client:
            assert "resumed" not in await client.begin()


async def test_the_reply_under_way_ends_where_the_connection_was_lost(
    gate: threading.Event,
) -> None:
    engine = FakeEngine(TextDelta("One two three four. "), sound(22_050), gate, *STOP)
    with serving(engine) as url:
        async with connected(url) as client:
            session = await client.begin(**MANUAL)
            await client.say()
            await client.send("response.create")
            await client.until("response.output_audio.delta")
            await client.lose()
            assert engine.cancelled.wait(3)
        engine.steps = STOP
        async with connected(url, resume(session)) as client:
            await client.begin()
            await client.say()
            await client.reply()
            assert len(client.of("response.created")) == 1
    _, reply, _ = engine.heard
    assert reply.content[0].text.startswith("One")
    assert "Fine" not in reply.content[0].text


@pytest.mark.parametrize("session_id", ["sess_unknown", ""])
async def test_an_unknown_conversation_is_told_to_be_gone(session_id: str) -> None:
    with serving(FakeEngine()) as url:
        async with connected(url, f"?resume={session_id}") as client:
            code, reason = await client.closed()
    assert code == 1008 and "connect without resume" in reason
    assert [event["error"]["code"] for event in client.got] == ["session_expired"]


async def test_after_its_time_a_lost_conversation_is_gone() -> None:
    with serving(FakeEngine(*STOP), TalkConfig(resume_s=0.2)) as url:
        async with connected(url) as client:
            session = await begun(client)
            await client.lose()
            await asyncio.sleep(0.4)
        async with connected(url, resume(session)) as client:
            assert (await client.closed())[0] == 1008
            metrics = await client.metrics()
    assert 'omnispeech_talks_closed_total{reason="lost"} 1.0' in metrics
    assert 'omnispeech_talks{state="parked"} 0.0' in metrics


async def test_a_conversation_taken_up_does_not_end_at_its_old_time() -> None:
    with serving(FakeEngine(*STOP), TalkConfig(resume_s=0.3)) as url:
        async with connected(url) as client:
            session = await begun(client)
            await client.lose()
        for _ in range(2):
            async with connected(url, resume(session)) as client:
                assert (await client.begin())["resumed"]
                await asyncio.sleep(0.5)
                await client.lose()


async def test_a_conversation_that_is_over_gives_its_place_among_those_of_the_key_back(
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys.toml"
    key = 'key = "a-key-of-ann-0123456789"\nconversations = 1\n'
    keys.write_text(f"open_metrics = true\n[keys.ann]\n{key}")
    ann = {"Authorization": "Bearer a-key-of-ann-0123456789"}
    with serving(FakeEngine(*STOP), access=AccessConfig(api_keys=str(keys))) as url:
        for _ in range(2):
            async with connected(url, additional_headers=ann) as client:
                await client.begin()
                async with connected(url, additional_headers=ann) as second:
                    assert (await second.closed())[0] == 1013
            while await client.talks():
                await asyncio.sleep(0.005)


async def test_a_conversation_that_was_ended_is_gone() -> None:
    with serving(FakeEngine(*STOP)) as url:
        async with connected(url) as client:
            session = await begun(client)
        while await client.talks():
            await asyncio.sleep(0.005)
        async with connected(url, resume(session)) as client:
            assert (await client.closed())[0] == 1008


async def test_a_connection_that_only_seems_to_live_is_replaced() -> None:
    engine = FakeEngine(*STOP)
    with serving(engine) as url:
        async with connected(url) as old, connected(url) as other:
            session = await begun(old)
            await other.begin()
            async with connected(url, resume(session)) as client:
                assert (await client.begin())["id"] == session["id"]
                code, reason = await old.closed()
                assert code == 1000 and "another connection" in reason
                await client.say()
                assert (await client.reply())["status"] == "completed"
                metrics = await client.metrics()
    assert 'omnispeech_talks{state="connected"} 2.0' in metrics
    assert len(engine.heard) == 4


@pytest.mark.parametrize("lost", [True, False])
async def test_turns_are_detected_in_a_conversation_taken_up(
    lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omnispeech.server.realtime.hearing.hearing.SpeechDetector", Loudness)
    with serving(FakeEngine(*STOP)) as url:
        async with connected(url) as old:
            session = await old.begin()
            await old.append(noise(0.5))
            await old.until("input_audio_buffer.speech_started")
            if lost:
                await old.lose()
            async with connected(url, resume(session)) as client:
                await client.begin()
                await asyncio.sleep(0.1)
                await client.append(np.concatenate([noise(0.5), silence(1.0)]))
                assert (await client.until("response.done"))["response"]["status"] == "completed"
    assert len(client.of("input_audio_buffer.speech_started")) == 1


async def test_only_the_key_that_began_a_conversation_takes_it_up(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(
        "open_metrics = true\n"
        '[keys.ann]\nkey = "a-key-of-ann-0123456789"\n[keys.bob]\nkey = "a-key-of-bob-0123456789"\n'
    )
    with serving(FakeEngine(*STOP), access=AccessConfig(api_keys=str(keys))) as url:
        ann = {"Authorization": "Bearer a-key-of-ann-0123456789"}
        bob = {"Authorization": "Bearer a-key-of-bob-0123456789"}
        async with connected(url, additional_headers=ann) as client:
            session = await begun(client)
            await client.lose()
        async with connected(url, resume(session), additional_headers=bob) as client:
            assert (await client.closed())[0] == 1008
        async with connected(url, resume(session), additional_headers=ann) as client:
            assert (await client.begin())["resumed"]


async def test_who_waits_for_a_lost_client_makes_room_for_a_new_one() -> None:
    with serving(FakeEngine(*STOP), TalkConfig(max_talks=2)) as url:
        async with connected(url) as first, connected(url) as second:
            sessions = [await begun(first), await begun(second)]
            await first.lose()
            await second.lose()
        async with connected(url) as new:
            await new.begin()
            async with connected(url, resume(sessions[0])) as client:
                assert (await client.closed())[0] == 1008
            async with connected(url, resume(sessions[1])) as client:
                assert (await client.begin())["resumed"]


async def test_nothing_is_kept_where_resuming_is_off() -> None:
    with serving(FakeEngine(*STOP), TalkConfig(resume_s=0.0)) as url:
        async with connected(url) as client:
            session = await begun(client)
            await client.lose()
        async with connected(url, resume(session)) as client:
            assert (await client.closed())[0] == 1008
