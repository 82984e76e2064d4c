"""Spans of replies and of live conversations. The only module that imports OpenTelemetry.

The names of attributes are those of its conventions for generative models; what they have no name
for begins with "omnispeech".
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.context import attach, detach
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import omnispeech
from omnispeech.logs import CONVERSATION
from omnispeech.server.reply_record import ReplyRecord, played
from omnispeech.server.tracing import Headers, Tracing

SERVICE = "omnispeech"
CLOSE_S = 3.0  # a collector that does not answer keeps no server from its end
TRACE_HEADERS = ("traceparent", "tracestate")

Attributes = dict[str, str | int | float | list[str]]


def exporting() -> TracerProvider:
    """To the collector that the environment names, from a thread of its own."""
    named = OTELResourceDetector().detect()  # OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES
    resource = Resource.create({SERVICE_NAME: SERVICE}).merge(named)
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class ExportedTraces(Tracing):
    def __init__(self, provider: TracerProvider, model_name: str) -> None:
        self._provider = provider
        self._model = model_name
        self._tracer = provider.get_tracer(SERVICE, omnispeech.__version__)

    def request(self, headers: Headers) -> None:
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        known = {name: carrier[name] for name in TRACE_HEADERS if name in carrier}
        if known:
            attach(TraceContextTextMapPropagator().extract(known))

    @contextmanager
    def talk(self, conversation: str) -> Iterator[None]:
        span = self._tracer.start_span(
            "talk", kind=SpanKind.SERVER, attributes={"gen_ai.conversation.id": conversation}
        )
        token = attach(set_span_in_context(span))
        try:
            yield
        finally:
            detach(token)
            span.end()

    def reply(self, record: ReplyRecord) -> None:
        """Its span is made when it has ended; its times are those of the record."""
        since_ns = time.time_ns() - int(record.ended_s * 1e9)  # of the record's clock, in ours

        def wall_ns(moment_s: float) -> int:
            return since_ns + int(moment_s * 1e9)

        span = self._tracer.start_span(
            f"chat {self._model}",
            attributes=asked(record, self._model) | told(record),
            start_time=wall_ns(record.begun_s if record.asked_s is None else record.asked_s),
        )
        for name, after_s in (
            ("first_text", record.after_question_s(record.first_text_s)),
            ("first_audio", record.after_question_s(record.first_sound_s)),
        ):
            if after_s is not None and record.asked_s is not None:
                span.add_event(name, timestamp=wall_ns(record.asked_s + after_s))
        if record.done is None and record.outcome != "cancelled":
            span.set_attribute("error.type", str(record.outcome))
            span.set_status(Status(StatusCode.ERROR))
        span.end(wall_ns(record.ended_s))

    def close(self) -> None:
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def asked(record: ReplyRecord, model: str) -> Attributes:
    request = record.request
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": SERVICE,
        "gen_ai.request.model": model,
        "gen_ai.conversation.id": CONVERSATION.get(),
        "gen_ai.output.type": "speech" if request.speech else "text",
        "gen_ai.request.max_tokens": request.max_new_tokens,
        "gen_ai.request.temperature": request.temperature,
        "gen_ai.request.top_p": request.top_p,
    }


def told(record: ReplyRecord) -> Attributes:
    attributes: Attributes = {"omnispeech.outcome": str(record.outcome)}
    if record.pieces:
        attributes["omnispeech.audio_s"] = record.audio_s
        attributes["omnispeech.underrun_s"] = played(record.handed_over).underrun_s
    if done := record.done:
        attributes |= {
            "gen_ai.response.finish_reasons": [done.text_finish],
            "gen_ai.usage.input_tokens": done.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": done.cached_tokens,
            "gen_ai.usage.output_tokens": done.text_tokens,
            "omnispeech.speech_units": done.units,
            "omnispeech.queue_s": record.queue_s,
            "omnispeech.seed": done.seed,
        }
    return attributes
