"""A reply on its way to one caller."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, Literal, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from omnispeech.engine.events import Done, Event, TextDelta
from omnispeech.logs import CONVERSATION

STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

Status = Literal["running", "done", "failed", "cancelled"]
Result = TypeVar("Result")


class Reply:
    """The events of one turn, and what is known of it so far. Closing it early cancels it."""

    def __init__(self, events: AsyncGenerator[Event, None]) -> None:
        self.id = CONVERSATION.get()  # of the request, by which the log knows it
        self.status: Status = "running"
        self.text = ""
        self.failure: str | None = None
        self.done: Done | None = None
        self._events = events
        self._first: Event | None = None

    async def start(self) -> None:
        """Takes the first event: a refusal is raised here, before any byte is sent."""
        self._first = await anext(self._events)

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            if self._first is not None:
                yield self._noted(self._first)
            async for event in self._events:
                yield self._noted(event)
        except Exception as exc:
            self.status, self.failure = "failed", str(exc)
            raise

    def _noted(self, event: Event) -> Event:
        if isinstance(event, TextDelta):
            self.text += event.text
        elif isinstance(event, Done):
            self.status, self.done = "done", event
        return event

    async def aclose(self) -> None:
        if self.status == "running":
            self.status = "cancelled"
        await self._events.aclose()


async def begin(request: Request, events: AsyncGenerator[Event, None]) -> Reply:
    """A started reply. The turn ends if the caller leaves while it waits for its first event.

    The body of the request must have been read.
    """
    reply = Reply(events)
    await while_caller_stays(request, reply.start())
    return reply


async def while_caller_stays(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` gives; it is cancelled if the caller leaves before. The body has been read."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_until_caller_leaves(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.wait((working, leaving))


async def _until_caller_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class ReplyResponse(StreamingResponse):
    """Sends `body` as it is made; however the sending ends, the reply is closed."""

    def __init__(
        self,
        body: AsyncIterator[bytes],
        reply: Reply,
        media_type: str,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(body, headers=STREAM_HEADERS | (headers or {}), media_type=media_type)
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._reply.aclose()


def summary(done: Done) -> dict[str, Any]:
    """What is told at the end of a reply."""
    return {
        "finish": {"text": done.text_finish, "speech": done.speech_finish},
        "usage": {
            "prompt_tokens": done.prompt_tokens,
            "text_tokens": done.text_tokens,
            "units": done.units,
        },
        "seed": done.seed,
        "timings": {
            "first_text_s": done.first_text_s,
            "first_audio_s": done.first_audio_s,
            "total_s": done.total_s,
            "audio_s": done.audio_s,
            # JSON has no infinity.
            "real_time_factor": done.real_time_factor if done.audio_s else None,
        },
    }
