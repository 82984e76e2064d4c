"""Traces: their spans, their way to a collector, and nothing of them where none is named."""

import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from controller_server import worker_on_loopback
from fake_engine import DONE, FakeEngine, Step, sound, sound_file, tone
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from omnispeech.engine.events import Message, Text, TextDelta, TurnRequest
from omnispeech.errors import ConfigError, GenerationError, OmniSpeechError
from omnispeech.logs import CONVERSATION
from omnispeech.server.admission import Admission
from omnispeech.server.exported_traces import ExportedTraces
from omnispeech.server.tracing import Tracing, tracing_of

TESTS = Path(__file__).parent
WAV = sound_file(tone(0.2))
HELLO = TurnRequest(messages=(Message("user", (Text("hello"),)),), temperature=0.5)
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
COLLECTOR = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


class Traced:
    """An admission whose replies become spans in memory."""

    def __init__(self, *steps: Step) -> None:
        provider = TracerProvider()
        self._memory = InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(self._memory))
        self.tracing = ExportedTraces(provider, "tiny")
        self.admission = Admission(FakeEngine(*steps), self.tracing.reply)

    async def reply(self) -> ReadableSpan:
        try:
            async for _ in self.admission.answer(HELLO):
                pass
        except OmniSpeechError:
            pass
        return self.spans[-1]

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._memory.get_finished_spans()


async def test_a_reply_is_a_span_with_the_names_of_the_conventions() -> None:
    CONVERSATION.set("turn_1")
    span = await Traced().reply()
    assert span.name == "chat tiny"
    assert span.attributes is not None
    wanted = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.conversation.id": "turn_1",
        "gen_ai.output.type": "speech",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": DONE.prompt_tokens,
        "gen_ai.usage.output_tokens": DONE.text_tokens,
        "gen_ai.response.finish_reasons": ("stop",),
        "omnispeech.outcome": "length",
    }
    assert wanted.items() <= dict(span.attributes).items()


async def test_the_first_text_and_the_first_sound_are_events_inside_the_span() -> None:
    span = await Traced().reply()
    assert [event.name for event in span.events] == ["first_text", "first_audio"]
    assert span.start_time is not None and span.end_time is not None
    for event in span.events:
        assert span.start_time <= event.timestamp <= span.end_time


@pytest.mark.parametrize(
    ("steps", "is_error"), [((TextDelta("a"), DONE), False), ((GenerationError("x"),), True)]
)
async def test_a_reply_that_fails_is_a_span_of_an_error(
    steps: tuple[Step, ...], is_error: bool
) -> None:
    span = await Traced(*steps).reply()
    assert (not span.status.is_ok and not span.status.is_unset) == is_error
    assert ((span.attributes or {}).get("error.type") == "failed") == is_error


async def test_nothing_that_was_said_is_in_a_span() -> None:
    span = await Traced(TextDelta("secret"), sound(500), GenerationError("secret")).reply()
    assert "hello" not in span.to_json()
    assert "secret" not in span.to_json()


async def test_a_reply_belongs_to_the_trace_of_its_caller() -> None:
    traced = Traced()
    traced.tracing.request([(b"traceparent", f"00-{TRACE}-{SPAN}-01".encode())])
    span = await traced.reply()
    assert span.parent is not None and span.context is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == SPAN


async def test_the_replies_of_a_talk_belong_to_its_span() -> None:
    traced = Traced()
    with traced.tracing.talk("sess_1"):
        first, second = await traced.reply(), await traced.reply()
    talk = traced.spans[-1]
    assert talk.name == "talk" and talk.parent is None
    assert (talk.attributes or {})["gen_ai.conversation.id"] == "sess_1"
    for span in (first, second):
        assert span.parent is not None and talk.context is not None
        assert span.parent.span_id == talk.context.span_id
    assert (await traced.reply()).parent is None


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        COLLECTOR | {"OTEL_SDK_DISABLED": "true"},
        COLLECTOR | {"OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_a_collector_nothing_is_traced(environ: Mapping[str, str]) -> None:
    assert type(tracing_of(environ, "tiny")) is Tracing


def test_a_protocol_that_is_not_spoken_is_refused() -> None:
    with pytest.raises(ConfigError, match="'grpc' for traces; allowed: http/protobuf"):
        tracing_of(COLLECTOR | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "tiny")


def test_a_collector_without_the_packages_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "omnispeech.server.exported_traces")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(
        ConfigError,
        match="run: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http",
    ):
        tracing_of(COLLECTOR, "tiny")


def test_where_nothing_is_traced_nothing_of_it_is_imported() -> None:
    code = (
        "import sys\nfrom fake_engine import FakeEngine, app_with\napp_with(FakeEngine())\n"
        "names = ('opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "sys.exit(any(module.startswith(names) for module in sys.modules))"
    )
    python = [sys.executable, "-c", code]
    assert subprocess.run(python, cwd=TESTS, env=_without_otel()).returncode == 0


def _without_otel() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Its address, and the spans that came, each with its service."""
    came: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/v1/traces":
                for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                    service = {a.key: a.value.string_value for a in group.resource.attributes}
                    came.extend((service, one) for s in group.scope_spans for one in s.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *given: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", came
        finally:
            server.shutdown()
            thread.join()


def test_what_a_server_has_traced_is_at_the_collector_when_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with collector() as (url, came):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "counter")
        with worker_on_loopback(FakeEngine()) as worker:
            headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
            answer = httpx.post(f"{worker.url}/v1/speech", content=WAV, headers=headers)
            worker.http.stop()
            assert worker.ended(within_s=8)
    ((service, span),) = came
    assert service["service.name"] == "counter"
    assert (span.name, span.trace_id.hex()) == ("chat omnispeech", TRACE)
    told = {a.key: a.value.string_value for a in span.attributes}
    assert told["gen_ai.conversation.id"] == answer.headers["x-turn-id"]


def test_a_collector_that_is_not_there_costs_a_caller_nothing_and_the_end_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1/v1/traces")
    with worker_on_loopback(FakeEngine()) as worker:
        assert httpx.post(f"{worker.url}/v1/speech", content=WAV).status_code == 200
        worker.http.stop()
        assert worker.ended(within_s=8)
