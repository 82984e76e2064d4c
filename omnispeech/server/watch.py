"""What a server tells of its requests, its replies and its talks as they end: figures, lines in the
log, traces."""

import logging
from typing import Any
from uuid import uuid4

from prometheus_client import CollectorRegistry, Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omnispeech.logs import CONVERSATION, PATH
from omnispeech.server.access.callers import ANYBODY
from omnispeech.server.metrics import Replies, TalkFigures
from omnispeech.server.reply_record import ReplyRecord, played
from omnispeech.server.tracing import Tracing

logger = logging.getLogger(__name__)

NO_ROUTE = "none"


class Watch:
    def __init__(self, registry: CollectorRegistry, tracing: Tracing) -> None:
        self.tracing = tracing
        self.talks = TalkFigures(registry)
        self._replies = Replies(registry)
        self.requests = Counter(
            "omnispeech_requests",
            "Requests by route and status; of WebSockets the code they were closed with.",
            ["route", "status"],
            registry=registry,
        )

    def reply_ended(self, record: ReplyRecord) -> None:
        self._replies.ended(record)
        self.tracing.reply(record)
        figures = figures_of(record)
        shown = ", ".join(f"{name} {value}" for name, value in figures.items())
        logger.info("reply: %s", shown, extra={"fields": figures})


def figures_of(record: ReplyRecord) -> dict[str, Any]:
    """Those of them that it has: name -> outcome, seconds to the millisecond, or number."""
    figures: dict[str, Any] = {"outcome": record.outcome, "total_s": record.total_s}
    if record.caller.account is not ANYBODY:
        figures["key"] = record.caller.name
    figures["first_text_s"] = record.after_question_s(record.first_text_s)
    figures["first_audio_s"] = record.after_question_s(record.first_sound_s)
    if record.pieces:
        figures["audio_s"] = record.audio_s
        figures["underrun_s"] = played(record.handed_over).underrun_s
    if done := record.done:
        figures["real_time_factor"] = done.real_time_factor if done.audio_s else None
        figures["queue_s"] = record.queue_s
        figures["prompt_tokens"], figures["text_tokens"] = done.prompt_tokens, done.text_tokens
    return {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in figures.items()
        if value is not None
    }


class Watched:
    """Around the application: each request and each WebSocket has an id in the log, is counted by
    its route, and belongs to the trace that its headers name."""

    def __init__(self, app: ASGIApp, watch: Watch) -> None:
        self._app = app
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        CONVERSATION.set(uuid4().hex)
        PATH.set(scope["path"])
        self._watch.tracing.request(scope["headers"])
        status = "500" if scope["type"] == "http" else "left"  # unless the application says else

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = str(message["status"])
            elif message["type"] == "websocket.close":
                status = str(message.get("code", 1000))
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._watch.requests.labels(route_of(scope), status).inc()


def route_of(scope: Scope) -> str:
    """As it was declared: `/v1/speech/{turn_id}`."""
    return getattr(scope.get("route"), "path", NO_ROUTE)
