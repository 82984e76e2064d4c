"""GET /metrics, as Prometheus reads it."""

import threading
from dataclasses import replace
from typing import Any, get_args

import httpx
import pytest
from controller_server import until
from fake_engine import DONE, RATE_HZ, FakeEngine, app_with, call, serving, sound_file, tone
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from websockets.sync.client import connect

from omnispeech.engine.events import EngineStatus, TextDelta
from omnispeech.errors import GenerationError, Overloaded, RequestError
from omnispeech.phases import Phase
from omnispeech.server.metrics import TalkFigures
from omnispeech.server.reply_record import Outcome

WAV = sound_file(tone(0.2))
PHASES = {"read weights": Phase(12.5, 11_400_000_000), "warm up": Phase(0.75)}


class Metrics:
    """One app and what its /metrics tells."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.app = app_with(engine)

    async def ask(self, method: str, path: str, **given: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **given)

    async def values(self, name: str) -> dict[tuple[str, ...], float]:
        """Values of the labels -> value."""
        text = (await self.ask("GET", "/metrics")).text
        return {
            tuple(sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        }

    async def value(self, name: str) -> float:
        return (await self.values(name))[()]

    async def ended(self) -> dict[tuple[str, ...], float]:
        """Outcome -> how many replies had it, where there was one."""
        counts = await self.values("omnispeech_replies_total")
        return {outcome: count for outcome, count in counts.items() if count}


async def test_the_phases_of_the_start_are_told() -> None:
    metrics = Metrics(FakeEngine(status=EngineStatus(ready=True, phases=PHASES)))
    seconds = await metrics.values("omnispeech_startup_phase_seconds")
    assert seconds == {("read weights",): 12.5, ("warm up",): 0.75}
    size = await metrics.values("omnispeech_startup_phase_bytes")
    assert size == {("read weights",): 11.4e9, ("warm up",): 0.0}


@pytest.mark.parametrize("ready", [False, True])
async def test_readiness_is_told(ready: bool) -> None:
    metrics = Metrics(FakeEngine(status=EngineStatus(ready=ready)))
    assert await metrics.value("omnispeech_ready") == ready


async def test_a_server_that_stops_is_not_ready() -> None:
    metrics = Metrics(FakeEngine())
    metrics.app.state.admission.stop()
    assert await metrics.value("omnispeech_ready") == 0


async def test_conversations_and_their_limits_are_those_of_the_moment() -> None:
    metrics = Metrics(FakeEngine())
    metrics.engine._status = EngineStatus(
        ready=True, running=3, waiting=2, max_running=8, max_waiting=16
    )
    conversations = await metrics.values("omnispeech_conversations")
    assert conversations == {("running",): 3, ("waiting",): 2}
    limits = await metrics.values("omnispeech_conversations_limit")
    assert limits == {("running",): 8, ("waiting",): 16}


async def test_a_whole_reply_is_counted_and_timed() -> None:
    metrics = Metrics(FakeEngine())
    await metrics.ask("POST", "/v1/speech", content=WAV)
    assert await metrics.ended() == {("length",): 1}
    for name in ("time_to_first_text", "time_to_first_audio", "leading_silence", "underrun"):
        assert await metrics.value(f"omnispeech_{name}_seconds_count") == 1
    assert await metrics.value("omnispeech_real_time_factor_sum") == DONE.total_s / DONE.audio_s
    handed_over_s = pytest.approx(800 / RATE_HZ)  # 500 samples and 300
    assert await metrics.value("omnispeech_audio_seconds_total") == handed_over_s


async def test_tokens_and_the_queue_are_counted() -> None:
    done = replace(DONE, prompt_tokens=40, cached_tokens=30, text_tokens=9, units=50, queue_s=1.5)
    metrics = Metrics(FakeEngine(TextDelta("a"), done))
    await metrics.ask("POST", "/v1/speech", content=WAV)
    names = ("prompt_tokens", "cached_prompt_tokens", "text_tokens", "speech_units")
    counted = [await metrics.value(f"omnispeech_{name}_total") for name in names]
    assert counted == [40, 30, 9, 50]
    assert await metrics.value("omnispeech_queue_seconds_sum") == 1.5


async def test_the_memory_of_the_engine_is_told() -> None:
    status = EngineStatus(ready=True, kv_tokens=16384, kv_used=300, device_bytes=7_000_000_000)
    metrics = Metrics(FakeEngine(status=status))
    positions = await metrics.values("omnispeech_kv_positions")
    assert positions == {("used",): 300, ("limit",): 16384}
    assert await metrics.value("omnispeech_device_memory_bytes") == 7e9


async def test_requests_are_counted_by_route_and_status() -> None:
    metrics = Metrics(FakeEngine())
    await metrics.ask("POST", "/v1/speech", content=WAV)
    await metrics.ask("POST", "/v1/speech", content=b"no sound")
    for turn_id in ("one", "other"):
        await metrics.ask("GET", f"/v1/speech/{turn_id}")
    await metrics.ask("GET", "/wp-login.php")
    assert await metrics.values("omnispeech_requests_total") == {
        ("/v1/speech", "200"): 1,
        ("/v1/speech", "400"): 1,
        ("/v1/speech/{turn_id}", "404"): 2,
        ("none", "404"): 1,
    }


def test_websockets_are_counted_by_how_they_ended() -> None:
    with serving(FakeEngine()) as url:
        with connect(url.replace("http", "ws") + "/ws/stream"):
            pass
        line = 'omnispeech_requests_total{route="/ws/stream",status="left"} 1.0'
        until(lambda: line in httpx.get(f"{url}/metrics").text.splitlines())


async def test_talks_are_counted_as_they_come_park_and_go() -> None:
    metrics = Metrics(FakeEngine())
    talks: TalkFigures = metrics.app.state.watch.talks
    for _ in range(3):
        talks.talk_opened()
    talks.talk_parked()
    talks.talk_parked()
    assert await metrics.values("omnispeech_talks") == {("connected",): 1, ("parked",): 2}
    talks.talk_resumed()
    talks.talk_closed("left")
    talks.talk_closed("lost", parked=True)
    assert await metrics.values("omnispeech_talks") == {("connected",): 1, ("parked",): 0}
    closed = await metrics.values("omnispeech_talks_closed_total")
    assert {reason: n for reason, n in closed.items() if n} == {("left",): 1, ("lost",): 1}


async def test_interruptions_are_counted_and_timed() -> None:
    metrics = Metrics(FakeEngine())
    metrics.app.state.watch.talks.barge_in()
    metrics.app.state.watch.talks.stop_latency(0.02)
    assert await metrics.value("omnispeech_barge_ins_total") == 1
    assert await metrics.value("omnispeech_stop_latency_seconds_sum") == 0.02


async def test_every_outcome_is_told_before_it_happens() -> None:
    counts = await Metrics(FakeEngine()).values("omnispeech_replies_total")
    assert counts == {(outcome,): 0.0 for outcome in get_args(Outcome)}


async def test_a_reply_without_sound_is_counted_and_not_timed() -> None:
    metrics = Metrics(FakeEngine(TextDelta("a"), replace(DONE, audio_s=0.0, first_audio_s=0.0)))
    await metrics.ask("POST", "/v1/speech", content=WAV)
    assert await metrics.ended() == {("length",): 1}
    assert await metrics.value("omnispeech_real_time_factor_count") == 0


@pytest.mark.parametrize(
    ("finish", "outcome"),
    [(("stop", "stop"), "stop"), (("length", "stop"), "length"), (("stop", "length"), "length")],
)
async def test_a_reply_that_a_limit_ended_is_told_from_one_the_model_ended(
    finish: tuple[Any, Any], outcome: str
) -> None:
    done = replace(DONE, text_finish=finish[0], speech_finish=finish[1])
    metrics = Metrics(FakeEngine(TextDelta("a"), done))
    await metrics.ask("POST", "/v1/speech", content=WAV)
    assert await metrics.ended() == {(outcome,): 1}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Overloaded("full"), "unavailable"),
        (RequestError("too long"), "refused"),
        (GenerationError("device"), "failed"),
        (KeyError("defect"), "failed"),
    ],
)
async def test_a_reply_that_fails_is_counted_by_its_reason_and_not_timed(
    error: Exception, outcome: str
) -> None:
    metrics = Metrics(FakeEngine(error))
    for path in ("/v1/speech", "/worker_generate_stream"):
        body = {"messages": [{"role": "user", "content": "hi"}]}
        given = {"content": WAV} if path == "/v1/speech" else {"json": body}
        await metrics.ask("POST", path, **given)
    assert await metrics.ended() == {(outcome,): 2}
    assert await metrics.value("omnispeech_time_to_first_audio_seconds_count") == 0


def test_a_caller_that_leaves_is_counted_as_such() -> None:
    engine = FakeEngine(TextDelta("a"), threading.Event())
    with serving(engine) as url:
        with httpx.stream("POST", f"{url}/v1/speech?format=events", content=WAV) as response:
            next(response.iter_raw())
        assert engine.cancelled.wait(2)
        assert (
            'omnispeech_replies_total{outcome="cancelled"} 1.0'
            in httpx.get(f"{url}/metrics").text.splitlines()
        )


async def test_the_memory_of_the_process_is_told() -> None:
    assert await Metrics(FakeEngine()).value("process_resident_memory_bytes") > 10_000_000


async def test_apps_in_one_process_count_apart_and_touch_no_registry_of_others() -> None:
    one, other = Metrics(FakeEngine()), Metrics(FakeEngine())
    await one.ask("POST", "/v1/speech", content=WAV)
    assert await one.ended() == {("length",): 1}
    assert await other.ended() == {}
    assert not [name for name in REGISTRY._names_to_collectors if name.startswith("omnispeech")]


async def test_the_content_type_is_that_of_prometheus() -> None:
    response = await call(FakeEngine(), "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")


def test_head_answers_without_the_body() -> None:
    with serving(FakeEngine()) as url:
        head = httpx.head(f"{url}/metrics")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) > 1000
