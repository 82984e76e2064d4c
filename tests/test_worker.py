"""The thread that owns the device, through its asyncio interface."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import pytest
from golden_models import golden_models, question

from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.events import AudioDelta, Done, Event, TextDelta
from omnispeech.engine.session import Session
from omnispeech.engine.worker import Worker
from omnispeech.errors import GenerationError, NotReady, Overloaded, PromptTooLong, RequestError

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


async def test_leaving_early_cancels_the_reply_within_a_step(worker: Worker) -> None:
    """Defect C2, counted: the step under way, and nothing after it."""
    answer = worker.answer(question(max_new_tokens=1000))
    await anext(answer)
    await answer.aclose()
    steps = worker.conversations.steps
    while worker.conversations.scheduler.running:
        await asyncio.sleep(0.01)
    assert worker.conversations.steps - steps <= 1
    assert worker.status().waiting == 0
    assert worker.conversations.runner.speech_cache.free_tokens == SMALL.kv_tokens


class HastyLoop(asyncio.SelectorEventLoop):
    """Whatever waits for a time, waits no longer than it takes to look at the clock."""

    def call_at(self, when: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
        return super().call_at(min(when, self.time()), *args, **kwargs)


def test_b2_no_timeout_of_any_length_ends_a_healthy_reply() -> None:
    async def talk() -> Event:
        one = await until_ready(Worker(golden_models, SMALL, QUICK))
        events = await reply(one)
        one.close()
        return events[-1]

    loop = HastyLoop()
    assert isinstance(loop.run_until_complete(talk()), Done)
    loop.close()


async def test_c3_events_enter_the_loop_in_its_own_thread(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue of a loop, as its semaphore, is not made for other threads."""
    threads, original = set(), asyncio.Queue.put_nowait

    def put(queue: asyncio.Queue[Any], item: object) -> None:
        threads.add(threading.current_thread().name)
        original(queue, item)

    monkeypatch.setattr(asyncio.Queue, "put_nowait", put)
    with suppress(TimeoutError):
        await asyncio.wait_for(reply(worker), 10)
    assert threads == {threading.current_thread().name}


async def test_c3_a_caller_that_waits_gets_the_place_of_one_that_leaves(worker: Worker) -> None:
    talking = [worker.answer(question(max_new_tokens=300)) for _ in range(2)]
    for answer in talking:
        await anext(answer)
    waiting = asyncio.ensure_future(reply(worker))
    await asyncio.sleep(0.1)
    assert not waiting.done() and worker.status().waiting == 1
    for answer in talking:
        await answer.aclose()
    assert isinstance((await asyncio.wait_for(waiting, 20))[-1], Done)
    assert worker.status().waiting == 0


async def test_c1_the_loop_is_free_while_a_prompt_is_made(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, original = threading.Event(), worker.conversations.open

    def slow(*args: Any) -> Session:
        assert gate.wait(5)
        return original(*args)

    monkeypatch.setattr(worker.conversations, "open", slow)
    waiting = asyncio.ensure_future(reply(worker))
    await asyncio.sleep(0.05)
    gate.set()
    assert isinstance((await waiting)[-1], Done)


async def test_a_caller_that_leaves_while_its_prompt_is_made_leaves_nothing(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, original = threading.Event(), worker.conversations.open
    made: list[weakref.ref[Any]] = []

    def slow(*args: Any) -> Session:
        assert gate.wait(5)
        session = original(*args)
        made.append(weakref.ref(session.interleaver))
        return session

    monkeypatch.setattr(worker.conversations, "open", slow)
    inserted: list[Session] = []
    monkeypatch.setattr(worker.conversations, "insert", inserted.append)
    callers = [asyncio.ensure_future(reply(worker)) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert worker.status().waiting == 3
    for caller in callers:
        caller.cancel()
    assert all(
        isinstance(r, BaseException) for r in await asyncio.gather(*callers, return_exceptions=True)
    )
    assert worker.status().waiting == 0
    gate.set()
    while len(made) < 3:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    del callers
    gc.collect()
    assert inserted == [] and [interleaver() for interleaver in made] == [None] * 3


MODES: tuple[dict[str, Any], ...] = ({}, {"speech": False}, {"script": "As I said before."})


async def test_a_hundred_turns_that_are_left_leave_everything_as_it_was(worker: Worker) -> None:
    for mode in MODES:
        assert isinstance((await reply(worker, **mode))[-1], Done)
    await until_idle(worker)
    before = worker.status()
    for i in range(100):
        answer = worker.answer(question(**MODES[i % 3]))
        for _ in range(i % 4):
            await anext(answer)
        await answer.aclose()
        if i % 10 == 0:  # others are left while they wait for a place
            crowd = [asyncio.ensure_future(reply(worker)) for _ in range(3)]
            await asyncio.sleep(0.002 * i)
            for caller in crowd:
                caller.cancel()
            await asyncio.gather(*crowd, return_exceptions=True)
    await until_idle(worker)
    assert worker.status() == before
    assert (before.running, before.waiting, before.kv_tokens) == (0, 0, SMALL.kv_tokens)
    runner = worker.conversations.runner
    assert before.kv_used == runner.prefixes.kept_tokens > 0
    assert runner.speech_cache.used_tokens == 0


async def until_idle(worker: Worker) -> None:
    while worker._open or not worker.conversations.idle or not worker._inbox.empty():
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)  # whoever was being prepared


async def test_the_status_tells_the_memory_of_conversations(worker: Worker) -> None:
    answer = worker.answer(question(max_new_tokens=300))
    await anext(answer)
    status = worker.status()
    assert status.kv_tokens == SMALL.kv_tokens and status.kv_used >= 300
    assert status.device_bytes == 0  # counted on a GPU alone
    await answer.aclose()


async def test_a_prompt_that_is_too_long_is_refused_before_anything_is_queued(
    worker: Worker,
) -> None:
    steps = worker.conversations.steps
    with pytest.raises(PromptTooLong):
        await reply(worker, text="word " * 5000)
    assert worker.conversations.steps == steps and worker._inbox.empty()


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

    def broken(*args: object) -> object:
        session = original(*args)  # type: ignore[arg-type]
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
    assert set(one.status().phases) == {"take memory of conversations", "warm up"}
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


async def test_an_engine_that_breaks_tells_its_callers_and_is_not_ready_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread once died in silence: callers waited for ever and /ready stayed green."""
    told = threading.Event()
    one = Worker(golden_models, SMALL, QUICK)
    one.start(on_failure=told.set)
    while not one.status().ready:
        await asyncio.sleep(0.01)
    monkeypatch.setattr(one.conversations.scheduler, "update", lambda: 1 / 0)
    with pytest.raises((GenerationError, NotReady), match="division by zero"):
        await asyncio.wait_for(reply(one), timeout=10.0)
    assert await asyncio.to_thread(told.wait, 5.0)
    assert not one.status().ready
    one.close()


async def test_a_request_that_is_prepared_while_the_worker_stops_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = await until_ready(Worker(golden_models, SMALL, QUICK))
    original = one.conversations.open

    def slow(*args: object) -> object:
        session = original(*args)  # type: ignore[arg-type]
        one.close()
        return session

    monkeypatch.setattr(one.conversations, "open", slow)
    with pytest.raises(NotReady, match="stopping"):
        await asyncio.wait_for(reply(one), timeout=10.0)


async def test_times_count_from_the_call_of_answer(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = worker.conversations.open

    def slow(*args: object) -> object:
        time.sleep(0.3)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(worker.conversations, "open", slow)
    done = (await reply(worker))[-1]
    assert isinstance(done, Done)
    assert done.first_text_s >= 0.3
