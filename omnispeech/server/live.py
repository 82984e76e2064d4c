"""WebSocket /ws/stream: the caller's sound goes in all the time, a trigger asks for the answer."""

import asyncio
import json
import logging
import struct
from contextlib import aclosing, suppress
from typing import Any

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ValidationError

from omnispeech.audio.io import encode_wav
from omnispeech.engine.events import AudioDelta, Done, Event, Samples, SpeechEngine, TextDelta
from omnispeech.errors import (
    GenerationError,
    OmniSpeechError,
    RequestError,
    TooManyRequests,
    Unavailable,
)
from omnispeech.server.access.callers import CALLER
from omnispeech.server.protocol import spoken_turn
from omnispeech.server.refusal import field_error
from omnispeech.server.refusal_by_path import close_code, close_reason
from omnispeech.server.reply import Reply, summary
from omnispeech.server.window import RollingWindow

logger = logging.getLogger(__name__)

TRIGGER = "trigger_response"


class Command(BaseModel):
    type: str


def live_routes(engine: SpeechEngine) -> APIRouter:
    router = APIRouter()

    @router.websocket("/ws/stream")
    async def stream(socket: WebSocket) -> None:
        await socket.accept()
        try:
            with CALLER.get().talk():
                await LiveTalk(socket, engine).run()
        except TooManyRequests as exc:
            await socket.close(close_code(exc), close_reason(exc))

    return router


class LiveTalk:
    """One connection: a window that fills while an answer is being sent."""

    def __init__(self, socket: WebSocket, engine: SpeechEngine) -> None:
        self._socket = socket
        self._engine = engine
        self._with_events = socket.query_params.get("events") == "1"
        self._window = RollingWindow()
        self._answering = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        try:
            while (message := await self._socket.receive())["type"] != "websocket.disconnect":
                with suppress(WebSocketDisconnect):  # the next message says so again
                    await self._take(message.get("bytes"), message.get("text"))
        finally:
            await self._stop()

    async def _take(self, pcm: bytes | None, text: str | None) -> None:
        try:
            if pcm is not None:
                self._window.append(pcm)
            else:
                self._obey(text or "")
        except RequestError as exc:
            await self._tell_error(exc)

    def _obey(self, text: str) -> None:
        try:
            command = Command.model_validate_json(text)
        except ValidationError as exc:
            raise field_error(exc.errors(include_url=False)) from exc
        if command.type != TRIGGER:
            raise RequestError(f"unknown message type {command.type!r}; known: {TRIGGER}")
        if self._answering:
            logger.info("/ws/stream: a trigger during an answer is ignored")
            return
        if not self._window.seconds:
            raise RequestError("there is no audio since the last turn; send audio, then trigger")
        self._answering = True
        task = asyncio.create_task(self._answer(self._window.take()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, question: Samples) -> None:
        with suppress(WebSocketDisconnect):  # `run` finds out as well, and ends the talk
            try:
                await self._tell_end(await self._tell_reply(question))
            except OmniSpeechError as exc:
                await self._tell_error(exc)
            except Exception:
                logger.exception("/ws/stream: an answer failed")
                await self._tell_error(GenerationError("the server failed; its log has the reason"))

    async def _tell_reply(self, question: Samples) -> Done | None:
        """Once this is left the next trigger counts, even one that answers the end frame."""
        try:
            async with aclosing(Reply(self._engine.answer(spoken_turn(question)))) as reply:
                async for event in reply:
                    await self._tell(event)
            return reply.done
        except Unavailable:  # always before the first event: the next trigger asks again
            self._window.put_back(question)
            raise
        finally:
            self._answering = False

    async def _tell(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            await self._tell_json(type="text", text=event.text)
        elif isinstance(event, AudioDelta):
            wav = encode_wav(event.pcm, self._engine.sample_rate_hz)
            await self._socket.send_bytes(struct.pack("<I", len(wav)) + wav)

    async def _tell_end(self, done: Done | None) -> None:
        if done is not None:
            await self._tell_json(type="end", **summary(done))

    async def _tell_error(self, exc: OmniSpeechError) -> None:
        logger.info("/ws/stream: %s", type(exc).__name__)
        logger.debug("/ws/stream: %s", exc)
        await self._tell_json(type="error", error=type(exc).__name__, message=str(exc))

    async def _tell_json(self, **fields: Any) -> None:
        if self._with_events:
            await self._socket.send_text(json.dumps(fields))

    async def _stop(self) -> None:
        """The caller is gone: nothing more is generated for it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
