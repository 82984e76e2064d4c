"""One WebSocket of a talk: what comes is taken in order, what is told is sent in order."""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect
from starlette.types import Message
from starlette.websockets import WebSocketState

from omnispeech.errors import GenerationError
from omnispeech.server.realtime.outbox import EVENT_ROOM, Outbox
from omnispeech.server.realtime.protocol.refusals import binary_frame, error_event
from omnispeech.server.realtime.talk import NORMAL, Close, Talk

logger = logging.getLogger(__name__)

FLUSH_S = 10.0  # a client that is told goodbye may read this long
LONGEST_REASON = 123  # bytes, of a close frame
FAILED = Close(1011, "the server failed; its log has the reason", "failed")


class Connection:
    def __init__(self, socket: WebSocket, talk: Talk) -> None:
        self._socket = socket
        self._talk = talk
        self._outbox = Outbox(socket)
        self._ended: asyncio.Future[Close] = asyncio.get_running_loop().create_future()
        self.left = asyncio.Event()  # the talk is free for another connection
        self.gone = asyncio.Event()  # the client has been told

    def end(self, close: Close) -> None:
        """The first reason counts."""
        if not self._ended.done():
            self._ended.set_result(close)

    async def run(self, *, resumed: bool) -> Close:
        """Returns when the talk has let go of this connection; `goodbye` closes it."""
        sending = asyncio.create_task(self._outbox.run())
        tasks: set[asyncio.Task[None]] = set()
        try:
            await self._talk.enter(self._outbox, self.end, resumed=resumed)
            tasks = {self._begin(self._read()), self._begin(self._watch())}
            return await self._ended
        finally:
            await self._stop(tasks)
            await self._talk.leave(lost=self._is_lost())
            self._outbox.close()
            self.left.set()
            await asyncio.wait([sending], timeout=FLUSH_S)
            await self._stop({sending})

    def _is_lost(self) -> bool:
        return not self._ended.done() or self._ended.result().end == "lost"

    async def goodbye(self, close: Close) -> None:
        try:
            if self._socket.client_state is WebSocketState.CONNECTED:
                await say_goodbye(self._socket, close)
        finally:
            self.gone.set()

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        async def guarded() -> None:
            try:
                await work
            except Exception:
                logger.exception("a connection of /v1/realtime failed")
                self.end(FAILED)

        return asyncio.create_task(guarded())

    async def _stop(self, tasks: set[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        while (message := await self._socket.receive())["type"] != "websocket.disconnect":
            await self._take(message)
            await self._outbox.room(EVENT_ROOM)
        code = message.get("code") or 1005
        self._outbox.drop()
        self.end(Close(code, "", "left" if code == NORMAL else "lost"))

    async def _take(self, message: Message) -> None:
        if message.get("text") is None:
            self._outbox.put(error_event(binary_frame()))
            return
        try:
            await self._talk.take(message["text"])
        except Exception:
            logger.exception("an event of /v1/realtime failed")
            failure = GenerationError("the server failed; its log has the reason")
            self._outbox.put(error_event(failure))

    async def _watch(self) -> None:
        """Ends the talk when nothing happens, or for too long."""
        loop = asyncio.get_running_loop()
        while True:
            at_s, close = self._talk.due()
            if at_s <= loop.time():
                self.end(close)
                return
            await asyncio.sleep(at_s - loop.time())


async def say_goodbye(socket: WebSocket, close: Close) -> None:
    """A reason longer than a close frame holds is cut."""
    reason = close.reason.encode()[:LONGEST_REASON].decode(errors="ignore")
    with suppress(RuntimeError, WebSocketDisconnect):  # the client was faster
        await socket.close(close.code, reason)
