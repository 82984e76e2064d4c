"""The thread that owns the device, through its asyncio interface."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from golden_models import golden_models, question

from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.events import AudioDelta, Done, Event, TextDelta
from omnispeech.engine.worker import Worker
from omnispeech.errors import GenerationError, NotReady, Overloaded, RequestError

SMALL = EngineConfig(
    kv_tokens=4096, context_length=4096, max_conversations=2, max_waiting=1, run_ahead=4
)
QUICK = DecoderConfig(euler_steps=1, first_block=10)


async def until_ready(worker: Worker) -> Worker:
    worker.start()
    while not worker.status().ready:
        await asyncio.sleep(0.01)
    return worker


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    one = await until_ready(Worker(golden_models, SMALL, QUICK))
    yield one
    one.close()


async def reply(worker: Worker, **settings: object) -> list[Event]:
    return [event async for event in worker.answer(question(**settings))]  # type: ignore[arg-type]


async def test_a_reply_arrives_as_it_is_made(worker: Worker) -> None:
    events = await reply(worker)
    assert isinstance(events[0], TextDelta)
    assert any(isinstance(event, AudioDelta) for event in events)
    done = events[-1]
    assert isinstance(done, Done)
    assert 0 < done.first_text_s <= done.first_audio_s <= done.total_s


async def test_a_full_worker_refuses_at_once(worker: Worker) -> None:
    taken = [asyncio.ensure_future(reply(worker, max_new_tokens=60)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 conversations are running and 1 wait"):
        await asyncio.wait_for(reply(worker), timeout=1.0)
    assert all(isinstance(events[-1], Done) for events in await asyncio.gather(*taken))
    assert isinstance((await reply(worker))[-1], Done)


async def test_leaving_early_cancels_the_reply(worker: Worker) -> None:
    answer = worker.answer(question(max_new_tokens=1000))
    await anext(answer)
    await answer.aclose()
    while worker.conversations.scheduler.running:
        await asyncio.sleep(0.01)
    assert worker.status().waiting == 0
    assert worker.conversations.runner.speech_cache.free_tokens == SMALL.kv_tokens


async def test_a_refused_request_gives_its_place_back(worker: Worker) -> None:
    for _ in range(5):
        with pytest.raises(RequestError):
            await reply(worker, text="word " * 5000)
    assert isinstance((await reply(worker))[-1], Done)


async def test_an_error_in_the_device_thread_reaches_its_caller_only(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    well = asyncio.ensure_future(reply(worker, max_new_tokens=40))
    original = worker.conversations.open

    def broken(request: object, emit: object) -> object:
        session = original(request, emit)  # type: ignore[arg-type]
        monkeypatch.setattr(session.text_stream, "push", lambda ids: 1 / 0)
        return session

    await asyncio.sleep(0.05)
    monkeypatch.setattr(worker.conversations, "open", broken)
    with pytest.raises(GenerationError, match="division by zero"):
        await reply(worker)
    assert isinstance((await well)[-1], Done)


async def test_not_ready_until_the_models_are_loaded_and_sound_was_made() -> None:
    gate = threading.Event()

    def load() -> object:
        gate.wait()
        return golden_models()

    one = Worker(load, SMALL, QUICK)  # type: ignore[arg-type]
    one.start()
    assert not one.status().ready
    with pytest.raises(NotReady, match="still being loaded"):
        await reply(one)
    gate.set()
    while not one.status().ready:
        await asyncio.sleep(0.01)
    assert set(one.status().phases) == {"load", "warm up"}
    one.close()


async def test_models_that_can_not_be_loaded_are_reported_and_not_served() -> None:
    told = threading.Event()

    def load() -> object:
        raise OSError("disk gone")

    one = Worker(load, SMALL, QUICK)  # type: ignore[arg-type]
    one.start(on_failure=told.set)
    assert await asyncio.to_thread(told.wait, 5.0)
    assert one.status().failure == "disk gone"
    with pytest.raises(NotReady, match="disk gone"):
        await reply(one)
    one.close()


async def test_a_model_that_makes_no_sound_is_never_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    import omnispeech.engine.vocoder as vocoder

    original = vocoder.CorrectedStream.push
    monkeypatch.setattr(
        vocoder.CorrectedStream, "push", lambda self, *args: original(self, *args) * 0.0
    )
    told = threading.Event()
    one = Worker(golden_models, SMALL, QUICK)
    one.start(on_failure=told.set)
    assert await asyncio.to_thread(told.wait, 20.0)
    assert "made no sound" in (one.status().failure or "")
    one.close()


async def test_replies_under_way_are_told_when_the_worker_stops() -> None:
    one = await until_ready(Worker(golden_models, SMALL, QUICK))
    answer = one.answer(question(max_new_tokens=1000))
    await anext(answer)
    await asyncio.to_thread(one.close)
    with pytest.raises(GenerationError, match="stopping"):
        async for _ in answer:
            pass


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "device" and t.is_alive()]
