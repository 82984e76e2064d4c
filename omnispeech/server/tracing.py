"""Traces for OpenTelemetry, where the environment names a collector. Elsewhere nothing of it is
imported."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from omnispeech.errors import ConfigError
from omnispeech.server.reply_record import ReplyRecord

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"

Headers = Iterable[tuple[bytes, bytes]]


class Tracing:
    """Nothing is traced."""

    def request(self, headers: Headers) -> None:
        """A caller's own trace, if its headers name one, is the parent of what this task does."""

    @contextmanager
    def talk(self, conversation: str) -> Iterator[None]:
        """Around a live conversation; replies of this task and of its children belong to it."""
        yield

    def reply(self, record: ReplyRecord) -> None:
        """One that has ended."""

    def close(self) -> None:
        """Sends what waits to be sent; not called on the event loop."""


def tracing_of(environ: Mapping[str, str], model_name: str) -> Tracing:
    """As OpenTelemetry's own variables want it. Raises ConfigError if it cannot be done."""
    if not is_wanted(environ):
        return Tracing()
    protocol = next((environ[name] for name in PROTOCOLS if environ.get(name)), PROTOCOL)
    if protocol != PROTOCOL:
        raise ConfigError(f"the protocol {protocol!r} for traces; allowed: {PROTOCOL}")
    try:
        from omnispeech.server.exported_traces import ExportedTraces, exporting
    except ImportError as exc:
        raise ConfigError(
            f"{' or '.join(ENDPOINTS)} is set, and OpenTelemetry is not installed; "
            "run: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http, or unset it"
        ) from exc
    return ExportedTraces(exporting(), model_name)


def is_wanted(environ: Mapping[str, str]) -> bool:
    off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    none = environ.get("OTEL_TRACES_EXPORTER", "") == "none"
    return any(environ.get(name) for name in ENDPOINTS) and not off and not none
