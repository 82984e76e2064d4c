"""Live conversations on a small real model."""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from golden_models import golden_worker
from realtime_client import MANUAL, Loudness, RealtimeClient, connected, noise, serving, silence

from omnispeech.config import TalkConfig
from omnispeech.engine.worker import Worker

LONG = {"max_output_tokens": 200}


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
