"""What /metrics tells, in Prometheus' text format. Each app has a registry of its own."""

from collections.abc import Iterator, Mapping
from typing import get_args

from fastapi import APIRouter, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    Metric,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from omnispeech.engine.events import Done
from omnispeech.server.admission import Admission, Outcome

FIRST_AUDIO_S = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
REAL_TIME_FACTORS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 4.0)


class Replies:
    """How replies ended and how fast they were; counted as they end."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ended = Counter(
            "omnispeech_replies", "Replies by how they ended.", ["outcome"], registry=registry
        )
        for outcome in get_args(Outcome):
            self._ended.labels(outcome)  # 0, so that the first failure is an increase
        self._first_audio = Histogram(
            "omnispeech_time_to_first_audio_seconds",
            "From the whole question to the first sound of the reply, the queue included.",
            buckets=FIRST_AUDIO_S,
            registry=registry,
        )
        self._real_time_factor = Histogram(
            "omnispeech_real_time_factor",
            "Seconds from the whole question to the end of the reply per second of its sound.",
            buckets=REAL_TIME_FACTORS,
            registry=registry,
        )
        self._audio = Counter(
            "omnispeech_audio_seconds", "Seconds of sound in whole replies.", registry=registry
        )

    def ended(self, outcome: Outcome, done: Done | None) -> None:
        self._ended.labels(outcome).inc()
        if done is not None and done.audio_s:
            self._first_audio.observe(done.first_audio_s)
            self._real_time_factor.observe(done.real_time_factor)
            self._audio.inc(done.audio_s)


class EngineGauges(Collector):
    """The engine's status at the moment it is asked for."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        status = self._admission.status()
        yield GaugeMetricFamily(
            "omnispeech_ready", "1 if replies are begun, as /ready says.", self._admission.ready
        )
        yield by_label(
            "omnispeech_conversations",
            "Conversations on the device (running) and in the queue (waiting).",
            "state",
            {"running": status.running, "waiting": status.waiting},
        )
        yield by_label(
            "omnispeech_conversations_limit",
            "How many conversations there may be.",
            "state",
            {"running": status.max_running, "waiting": status.max_waiting},
        )
        yield by_label(
            "omnispeech_startup_phase_seconds",
            "What the start of this process spent its time on.",
            "phase",
            {name: phase.seconds for name, phase in status.phases.items()},
        )
        yield by_label(
            "omnispeech_startup_phase_bytes",
            "What the phases of the start read from disk.",
            "phase",
            {name: phase.size for name, phase in status.phases.items()},
        )


def by_label(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value_of_label, value in values.items():
        family.add_metric([value_of_label], value)
    return family


def metrics_routes(registry: CollectorRegistry) -> APIRouter:
    router = APIRouter()

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router
