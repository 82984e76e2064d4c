"""What a replica does that a server alone need not: it says which one it is, limits the talks that
are kept open, and asks the others for what only they know."""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omnispeech.errors import NotReady, Overloaded
from omnispeech.server.refusal import refusal
from omnispeech.server.refusal_by_path import refuse_websocket

REPLICA_HEADER = "X-Replica"
TEXTS = "/v1/speech/"
METRICS = "/metrics"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one replica said to a GET."""

    replica: str
    status: int
    body: bytes
    media_type: str


# path and headers of the question; nothing is answered if a replica is too slow
AskAll = Callable[[str, dict[str, str]], Awaitable[Sequence[Answer]]]


class OneOfMany:
    """Around the application of one replica. `ask_all` puts a GET to every replica, itself too.

    It stands before the guard of the application: what is gathered was asked of guarded ones.
    """

    def __init__(self, app: ASGIApp, replica: str, most_talks: int, ask_all: AskAll) -> None:
        self._app = app
        self._replica = replica
        self._most_talks = most_talks
        self._ask_all = ask_all
        self._talks = 0  # WebSockets that are open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = self._named(send)
        if scope["type"] == "websocket":
            await self._talk(scope, receive, named)
        elif is_for_all(scope):
            answers = await self._ask_all(scope["path"], credentials(scope))
            response = gathered(scope["path"], answers)
            await response(scope, receive, named)
        else:
            await self._app(scope, receive, named)

    async def _talk(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One too many is told so and closed: a browser would not see a refused handshake."""
        if self._talks >= self._most_talks:
            full = Overloaded(f"{self._talks} conversations are open; try again in a second")
            await refuse_websocket(full, scope, receive, send)
            return
        self._talks += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._talks -= 1

    def _named(self, send: Send) -> Send:
        async def named(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                message.setdefault("headers", [])
                MutableHeaders(scope=message)[REPLICA_HEADER] = self._replica
            await send(message)

        return named


def is_for_all(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    path = scope["path"]
    return path == METRICS or path.startswith(TEXTS)


def credentials(scope: Scope) -> dict[str, str]:
    """What each replica looks at before it answers: it guards its own door."""
    given = Headers(scope=scope)
    return {name: given[name] for name in ("authorization", "host", "origin") if name in given}


def gathered(path: str, answers: Sequence[Answer]) -> Response:
    if not answers:
        return refusal(NotReady("a replica did not answer in time; try again later"))
    whole = [answer for answer in answers if answer.status == HTTPStatus.OK]
    return figures(whole) if path == METRICS and whole else best(answers)


def best(answers: Sequence[Answer]) -> Response:
    """That of the one replica which knows the turn, else any: they say the same."""
    answer = min(answers, key=lambda answer: answer.status)
    return Response(answer.body, answer.status, media_type=answer.media_type)


class Gathered(Collector):
    """Metrics of several replicas, each sample with the label `replica`."""

    def __init__(self, answers: Iterable[Answer]) -> None:
        self._families: dict[str, Metric] = {}
        for answer in answers:
            for family in text_string_to_metric_families(answer.body.decode()):
                self._add(family, answer.replica)

    def _add(self, family: Metric, replica: str) -> None:
        empty = Metric(family.name, family.documentation, family.type)
        known = self._families.setdefault(family.name, empty)
        for sample in family.samples:
            known.add_sample(sample.name, sample.labels | {"replica": replica}, sample.value)

    def collect(self) -> Iterator[Metric]:
        yield from self._families.values()


def figures(answers: Iterable[Answer]) -> Response:
    registry = CollectorRegistry()
    registry.register(Gathered(answers))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
