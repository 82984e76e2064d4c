"""Whatever a client sends, in whatever order: the talk goes on, and every reply has one end."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from fake_engine import DONE, FakeEngine, serving, sound
from hypothesis import given, settings
from hypothesis import strategies as st
from realtime_client import Loudness, RealtimeClient, connected, encoded, noise, silence

from omnispeech.engine.events import Event, TextDelta, ToolCall, TurnRequest

Frame = str | bytes | float  # float: the client waits so many seconds

SOUNDS = {"speech": encoded(noise(0.3)), "silence": encoded(silence(0.3))}
TEXT = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}


def event(kind: str, **fields: Any) -> str:
    return json.dumps({"type": kind, **fields})


def update(detection: dict[str, Any] | None) -> str:
    return event("session.update", session={"audio": {"input": {"turn_detection": detection}}})


VAD = {"type": "server_vad", "silence_duration_ms": 500}
FRAMES: list[Frame] = [
    *SOUNDS,
    *SOUNDS,
    *SOUNDS,
    event("input_audio_buffer.commit"),
    event("input_audio_buffer.clear"),
    *[event("response.create")] * 2,
    event("response.create", response={"conversation": "none", "output_modalities": ["text"]}),
    event("response.create", response={"input": [TEXT], "metadata": {"a": "b"}}),
    event("response.create", response={"tool_choice": "required"}),
    event("response.cancel"),
    event("response.cancel", response_id="resp_x"),
    event("conversation.item.create", item=TEXT),
    event("conversation.item.create", item=TEXT | {"id": "mine"}),
    event("conversation.item.create", item=TEXT, previous_item_id="mine"),
    event("conversation.item.delete", item_id="mine"),
    event("conversation.item.truncate", item_id="mine", content_index=0, audio_end_ms=5),
    event("conversation.item.retrieve", item_id="mine"),
    update(None),
    update(VAD),
    update(VAD | {"interrupt_response": False}),
    update(VAD | {"create_response": False}),
    event("session.update", session={"output_modalities": ["text"]}),
    event("session.update", session={"output_modalities": ["audio"], "instructions": "x"}),
    event("session.update", session={"audio": {"input": {"format": {"type": "audio/pcmu"}}}}),
    b"\x00\xff",
    "no JSON",
    "{}",
    0.005,
    0.02,
]


class Mixed(FakeEngine):
    """Replies of different kinds, which take their time."""

    async def answer(self, request: TurnRequest) -> AsyncGenerator[Event, None]:
        async with aclosing(super().answer(request)) as events:
            async for made in events:
                await asyncio.sleep(0.002)
                if request.speech or isinstance(made, type(DONE) | TextDelta | ToolCall):
                    yield made


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    steps = [step for _ in range(4) for step in (TextDelta("word "), sound(2000))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("omnispeech.server.realtime.hearing.hearing.SpeechDetector", Loudness)
        with serving(Mixed(*steps, ToolCall("f", "{}"), DONE)) as address:
            yield address


async def play(url: str, frames: list[Frame]) -> RealtimeClient:
    async with connected(url) as client:
        await client.begin()
        for frame in frames:
            if isinstance(frame, float):
                await asyncio.sleep(frame)
            elif isinstance(frame, str) and frame in SOUNDS:
                await client.send("input_audio_buffer.append", audio=SOUNDS[frame])
            else:
                await client.socket.send(frame)
        await client.socket.send(update(None))
        await client.sync()
        await all_ended(client)
        await client.send("conversation.item.create", item=TEXT)
        await client.reply()
        await all_ended(client)
    return client


async def all_ended(client: RealtimeClient) -> None:
    """A reply may be owed for a turn that ended while another was spoken."""
    while len(client.of("response.created")) > len(client.of("response.done")):
        await client.until("response.done")
        await client.sync()


@settings(max_examples=40)
@given(frames=st.lists(st.sampled_from(FRAMES), max_size=30))
def test_nothing_a_client_sends_ends_the_talk(url: str, frames: list[Frame]) -> None:
    """Its client checks the order of what it was told, and that one reply at most is active."""
    client = asyncio.run(play(url, frames))
    begun = [event["response"]["id"] for event in client.of("response.created")]
    ended = [event["response"]["id"] for event in client.of("response.done")]
    assert sorted(begun) == sorted(ended)
    assert client.of("response.done")[-1]["response"]["status"] == "incomplete"
    assert "server_error" not in {event["error"]["type"] for event in client.of("error")}
