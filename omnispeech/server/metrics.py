"""What /metrics tells, in Prometheus' text format. Each app has a registry of its own."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Literal, get_args

from fastapi import APIRouter, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from omnispeech.engine.events import Done
from omnispeech.server.admission import Admission, Fate
from omnispeech.server.reply_record import Outcome, Playback, ReplyRecord, played

LATENCIES_S = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
QUEUE_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
SHORT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
REAL_TIME_FACTORS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 4.0)
GAPS_MS = (0, 50, 100)  # that a listener may or may not notice

# left: the client closed; lost: it went away and did not resume; policy: a limit or a rule
TalkEnd = Literal["left", "lost", "idle", "duration", "stopping", "policy", "failed"]


class Replies:
    """How replies ended and how fast they were; counted as they end."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ended = Counter(
            "omnispeech_replies", "Replies by how they ended.", ["outcome"], registry=registry
        )
        for outcome in get_args(Outcome):
            self._ended.labels(outcome)  # 0, so that the first failure is an increase
        self._first_text = Histogram(
            "omnispeech_time_to_first_text_seconds",
            "From the whole question to the first text of the reply, the queue included.",
            buckets=LATENCIES_S,
            registry=registry,
        )
        self._queue = Histogram(
            "omnispeech_queue_seconds",
            "From the whole question until there was a place on the device, of whole replies.",
            buckets=QUEUE_S,
            registry=registry,
        )
        self._sound = Sound(registry)
        self._tokens = Tokens(registry)

    def ended(self, record: ReplyRecord) -> None:
        if record.outcome:
            self._ended.labels(record.outcome).inc()
        if (first_text_s := record.after_question_s(record.first_text_s)) is not None:
            self._first_text.observe(first_text_s)
        if record.done:
            self._queue.observe(record.queue_s)
            self._tokens.count(record.done)
        if record.pieces:
            self._sound.heard(record)


class Sound:
    """Of the replies that have sound, whole or not."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._audio = Counter(
            "omnispeech_audio_seconds", "Seconds of sound handed over.", registry=registry
        )
        self._first_audio = Histogram(
            "omnispeech_time_to_first_audio_seconds",
            "From the whole question to the first sound that is not silence, the queue included.",
            buckets=LATENCIES_S,
            registry=registry,
        )
        self._silence = Histogram(
            "omnispeech_leading_silence_seconds",
            "Silence at the beginning of the sound.",
            buckets=SHORT_S,
            registry=registry,
        )
        self._real_time_factor = Histogram(
            "omnispeech_real_time_factor",
            "Seconds that a whole reply took, the queue included, per second of its sound.",
            buckets=REAL_TIME_FACTORS,
            registry=registry,
        )
        self._gap = Histogram(
            "omnispeech_audio_gap_seconds",
            "Between one piece of sound and the next of the same reply.",
            buckets=SHORT_S,
            registry=registry,
        )
        self._continuity = Continuity(registry)

    def heard(self, record: ReplyRecord) -> None:
        pieces = record.handed_over
        self._audio.inc(record.audio_s)
        self._silence.observe(record.silence_s)
        if (first_audio_s := record.after_question_s(record.first_sound_s)) is not None:
            self._first_audio.observe(first_audio_s)
        if record.done and record.done.audio_s:
            self._real_time_factor.observe(record.done.real_time_factor)
        for one, following in pairwise(pieces):
            self._gap.observe(following.at_s - one.at_s)
        self._continuity.judge(played(pieces))


class Continuity:
    """What a player would have heard that begins with the first piece of sound."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._underrun = Histogram(
            "omnispeech_underrun_seconds",
            "Silence of a player that had nothing to play, per reply with sound.",
            buckets=(0.0, *SHORT_S),
            registry=registry,
        )
        self._without_gap = Counter(
            "omnispeech_continuous_replies",
            "Replies with sound in which such a player never waited for longer than this.",
            ["gap_ms"],
            registry=registry,
        )
        for limit_ms in GAPS_MS:
            self._without_gap.labels(limit_ms)

    def judge(self, playback: Playback) -> None:
        self._underrun.observe(playback.underrun_s)
        for limit_ms in GAPS_MS:
            if playback.longest_wait_s * 1000 <= limit_ms:
                self._without_gap.labels(limit_ms).inc()


class Tokens:
    """Of whole replies."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._prompt = Counter(
            "omnispeech_prompt_tokens", "Positions of the prompts.", registry=registry
        )
        self._cached = Counter(
            "omnispeech_cached_prompt_tokens",
            "Of those, what an earlier turn had read already.",
            registry=registry,
        )
        self._text = Counter(
            "omnispeech_text_tokens", "Text tokens of the replies.", registry=registry
        )
        self._units = Counter(
            "omnispeech_speech_units", "Speech units of the replies.", registry=registry
        )

    def count(self, done: Done) -> None:
        self._prompt.inc(done.prompt_tokens)
        self._cached.inc(done.cached_tokens)
        self._text.inc(done.text_tokens)
        self._units.inc(done.units)


class TalkFigures:
    """Of the live conversations. Each that was opened is closed once, parked or not."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._talks = Gauge(
            "omnispeech_talks",
            "Live conversations: connected, or parked until their client resumes.",
            ["state"],
            registry=registry,
        )
        self._closed = Counter(
            "omnispeech_talks_closed",
            "Live conversations by how they ended.",
            ["reason"],
            registry=registry,
        )
        for reason in get_args(TalkEnd):
            self._closed.labels(reason)
        self._guesses = Counter(
            "omnispeech_speculations",
            "Answers begun in a pause: used, or thrown away as speech went on.",
            ["outcome"],
            registry=registry,
        )
        for fate in get_args(Fate):
            self._guesses.labels(fate)
        self._barge_ins = Counter(
            "omnispeech_barge_ins", "Replies that the speaker interrupted.", registry=registry
        )
        self._stop_latency = Histogram(
            "omnispeech_stop_latency_seconds",
            "From the interruption of a reply to the last of its sound that was sent.",
            buckets=SHORT_S,
            registry=registry,
        )
        self._connected, self._parked = (
            self._talks.labels("connected"),
            self._talks.labels("parked"),
        )

    def talk_opened(self) -> None:
        self._connected.inc()

    def talk_parked(self) -> None:
        """Its connection was lost; it waits for another."""
        self._connected.dec()
        self._parked.inc()

    def talk_resumed(self) -> None:
        self._parked.dec()
        self._connected.inc()

    def talk_closed(self, reason: TalkEnd, *, parked: bool = False) -> None:
        (self._parked if parked else self._connected).dec()
        self._closed.labels(reason).inc()

    def guessed(self, fate: Fate) -> None:
        self._guesses.labels(fate).inc()

    def barge_in(self) -> None:
        self._barge_ins.inc()

    def stop_latency(self, seconds: float) -> None:
        """0 if nothing was sent after the interruption."""
        self._stop_latency.observe(seconds)


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
            "omnispeech_kv_positions",
            "Positions of all conversations, per language model: taken or kept, and there.",
            "state",
            {"used": status.kv_used, "limit": status.kv_tokens},
        )
        yield GaugeMetricFamily(
            "omnispeech_device_memory_bytes",
            "Memory of the device in use by this process; 0: not known.",
            status.device_bytes,
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
