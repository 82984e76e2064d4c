"""Live conversations on a small real model."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from golden_models import golden_models, golden_worker
from realtime_client import MANUAL, Loudness, RealtimeClient, connected, noise, serving, silence
from test_tool_calls import prompts

from omnispeech.config import TalkConfig
from omnispeech.engine.runner import Models
from omnispeech.engine.worker import Worker

LONG = {"max_output_tokens": 200}
WEATHER: Any = {"name": "weather", "parameters": {"type": "object"}}


@pytest.fixture(autouse=True)
def loudness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnispeech.server.realtime.hearing.hearing.SpeechDetector", Loudness)


@pytest.fixture
def worker() -> Iterator[Worker]:
    with golden_worker(kv_tokens=4096, context_length=1000) as one:
        yield one


async def free(worker: Any, within_s: float = 1.0) -> float:
    """Seconds until no row is taken."""
    begun_s = asyncio.get_running_loop().time()
    while worker.status().running or worker.status().waiting:
        assert asyncio.get_running_loop().time() - begun_s < within_s
        await asyncio.sleep(0.001)
    return asyncio.get_running_loop().time() - begun_s


async def replying(client: RealtimeClient) -> None:
    await client.say()
    await client.send("response.create")
    await client.until("response.output_audio.delta")


async def test_an_interruption_frees_the_row(worker: Worker) -> None:
    with serving(worker) as url:
        async with connected(url) as client:
            await client.begin(**LONG)
            await client.append(np.concatenate([noise(0.5), silence(1.0)]))
            await client.until("response.output_audio.delta")
            assert worker.status().running == 1
            await client.append(noise(0.3))
            response = (await client.until("response.done"))["response"]
            assert response["status"] == "cancelled"
            await free(worker)
            await client.append(silence(1.0))
            await client.until("response.output_audio.delta")


async def test_a_cancelled_reply_and_the_next_one_never_share_the_device(worker: Worker) -> None:
    with serving(worker) as url:
        async with connected(url) as client:
            await client.begin(**MANUAL, **LONG)
            await replying(client)
            for _ in range(5):
                await client.send("response.cancel")
                await client.send("response.create")
                await client.until("response.output_audio.delta")
                assert worker.status().running == 1
    assert {event["response"]["status"] for event in client.of("response.done")} == {"cancelled"}


@pytest.mark.parametrize("normal", [True, False])
async def test_whoever_leaves_frees_the_row(worker: Worker, normal: bool) -> None:
    with serving(worker) as url:
        async with connected(url) as client:
            await client.begin(**MANUAL, **LONG)
            await replying(client)
            assert worker.status().running == 1
            await (client.socket.close() if normal else client.lose())
        await free(worker)


async def test_an_answer_begun_in_a_pause_frees_the_row_when_speech_goes_on(
    worker: Worker,
) -> None:
    detection = {"type": "server_vad", "silence_duration_ms": 2000}
    with serving(worker, TalkConfig(speculate_ms=200)) as url:
        async with connected(url) as client:
            await client.begin(audio={"input": {"turn_detection": detection}}, **LONG)
            await client.append(np.concatenate([noise(0.5), silence(0.5)]))
            await client.sync()
            while not worker.status().running:
                await asyncio.sleep(0.001)
            await client.append(noise(0.5))
            await client.sync()
            await free(worker)
            assert "response.created" not in client.types()


async def test_two_conversations_talk_at_once(worker: Worker) -> None:
    async def turn(url: str) -> str:
        async with connected(url) as client:
            await client.begin(**MANUAL, max_output_tokens=4)
            for _ in range(2):
                await client.say()
                assert (await client.reply())["status"] in ("completed", "incomplete")
            return client.transcript()

    with serving(worker) as url:
        replies = await asyncio.gather(*(turn(url) for _ in range(3)))
    assert all(replies)
    await free(worker)


async def test_a_talk_at_the_end_of_its_context_leaves_room_for_whole_replies(
    worker: Worker,
) -> None:
    """The oldest turns go before a reply has to break off."""
    text = {"output_modalities": ["text"], "max_output_tokens": 100}
    with serving(worker) as url:
        async with connected(url) as client:
            await client.begin(**MANUAL, **text)
            lengths = []
            for _ in range(14):
                await client.write("How are you? " * 4)
                lengths.append((await client.reply())["usage"]["output_tokens"])
    assert lengths == [100] * 14


@pytest.fixture
def calling() -> Iterator[Worker]:
    """The same model with a chat template that has a place for functions."""

    def load() -> Models:
        models = golden_models()
        return replace(models, language=replace(models.language, prompt=prompts()))

    with golden_worker(load, kv_tokens=4096, context_length=1000) as one:
        yield one


async def chat_with_tools(url: str) -> httpx.Response:
    tools = [{"type": "function", "function": WEATHER}]
    asked = {"messages": [{"role": "user", "content": "hi"}], "tools": tools, "max_tokens": 4}
    async with httpx.AsyncClient() as client:
        return await client.post(f"{url}/v1/chat/completions", json=asked)


async def test_tools_that_the_template_has_no_place_for_are_refused_before_a_reply(
    worker: Worker,
) -> None:
    tool = {"type": "function", **WEATHER}
    called = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    text = {"output_modalities": ["text"], "max_output_tokens": 4}
    with serving(worker) as url:
        async with connected(url) as client:
            created = await client.begin()
            assert {"tools", "item.function_call"} <= created["unsupported"].keys()
            settings = {"type": "realtime", "tools": [tool], **MANUAL, **text}
            await client.send("session.update", session=settings)
            error = await client.error()
            assert (error["param"], error["code"]) == ("session.tools", "unsupported")
            assert error["message"].endswith(created["unsupported"]["tools"])
            session = (await client.until("session.updated"))["session"]
            assert (session["tools"], session["max_output_tokens"]) == ([], 4)
            await client.send("response.create", response={"tools": [tool]})
            assert (await client.error())["param"] == "response.tools"
            await client.send("conversation.item.create", item=called)
            assert (await client.error())["param"] == "item.type"
            await client.say()
            assert (await client.reply(tools=[]))["status"] in ("completed", "incomplete")
        answer = await chat_with_tools(url)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


async def test_tools_that_the_template_has_a_place_for_are_read(calling: Worker) -> None:
    tool = {"type": "function", **WEATHER}
    text = {"output_modalities": ["text"], "max_output_tokens": 4}
    with serving(calling) as url:
        async with connected(url) as client:
            created = await client.begin(**MANUAL, **text)
            assert not {"tools", "item.function_call"} & created["unsupported"].keys()
            await client.say()
            without = await client.reply()
            with_tools = await client.reply(tools=[tool])
            assert client.of("error") == []
        assert (await chat_with_tools(url)).status_code == 200
    tokens = [reply["usage"]["input_tokens"] for reply in (without, with_tools)]
    assert tokens[1] > tokens[0] + 20
