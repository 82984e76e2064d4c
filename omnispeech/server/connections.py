"""How many connections there may be, and how long and how much one may say before it is asked."""

import asyncio
import logging
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from omnispeech.errors import Overloaded
from omnispeech.server.refusal_by_path import answer, refuse_websocket
from omnispeech.server.watch import Watch, Watched

logger = logging.getLogger(__name__)

PROBES = {"/health", "/ready"}  # a server that is only full is not restarted
HEADERS_S = 10.0
HEAD_BYTES = 65_536  # h11 has the same limit of its own, httptools has none
READ_AWAY_S = 2.0
OPEN = "connections"  # in the state of a scope: how many were open when this one was made

KERNEL_BYTES = 32_768  # of a reply, that were not sent yet
LEAST_BYTES = 16_384  # that a caller takes while it counts as one that reads

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol
    from uvicorn.protocols.websockets.websockets_sansio_impl import (
        WebSocketsSansIOProtocol as WebSocketProtocol,
    )
else:  # of the parsers that are installed
    from uvicorn.protocols.http.auto import AutoHTTPProtocol as Protocol
    from uvicorn.protocols.websockets.auto import AutoWebSocketsProtocol as WebSocketProtocol


class Crowd:
    """ASGI, before everything else: one connection too many is told so, and closed.

    Those that were there before it stay. PatientProtocol counts them.
    """

    def __init__(self, app: ASGIApp, most: int, watch: Watch) -> None:
        self._app = app
        self._most = most
        self._told_no = Watched(self._tell_no, watch)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        there = scope["state"].get(OPEN, 0)  # 0: no connection, but the life of the server
        if there <= self._most or scope["path"] in PROBES:
            await self._app(scope, receive, send)
        else:
            await self._told_no(scope, receive, send)

    async def _tell_no(self, scope: Scope, receive: Receive, send: Send) -> None:
        full = Overloaded(f"{self._most} connections are open, the most there may be; come again")
        if scope["type"] == "websocket":
            await refuse_websocket(full, scope, receive, send)
            return
        await read_away(receive)
        response = answer(full, scope["path"])
        response.headers["Connection"] = "close"
        await response(scope, receive, send)


async def read_away(receive: Receive) -> None:
    """The body. A connection that is closed on unread bytes is reset, and its answer lost."""
    with suppress(TimeoutError):
        async with asyncio.timeout(READ_AWAY_S):
            while (await receive()).get("more_body"):
                pass


def keep_little(transport: asyncio.Transport) -> None:
    """In the kernel, which would keep megabytes of a reply for a caller that reads nothing, and
    show of one that reads slowly what it took in steps of as much."""
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # not on every system
        taken = transport.get_extra_info("socket")
        taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, KERNEL_BYTES)


class GivesUp(asyncio.Protocol):
    """Ends a connection whose caller takes less than LEAST_BYTES of what is on its way to it in
    `stalled_s`: whoever sends waits for it, and a close of uvicorn's waits as well."""

    transport: asyncio.Transport
    stalled_s: float
    _stall: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._leave_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave_reader()
        super().connection_lost(exc)

    def _watch_reader(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        loop = asyncio.get_running_loop()
        self._stall = loop.call_later(self.stalled_s, self._look_at_reader, waiting)

    def _leave_reader(self) -> None:
        if self._stall:
            self._stall.cancel()

    def _look_at_reader(self, before: int) -> None:
        if before - self.transport.get_write_buffer_size() >= LEAST_BYTES:
            self._watch_reader()
            return
        logger.info("a caller took nothing of its reply for %g s: given up", self.stalled_s)
        self.transport.abort()


class PatientProtocol(GivesUp, Protocol):
    """Ends a connection that sends no whole request head for HEADERS_S, or one over HEAD_BYTES.

    uvicorn closes one that is silent between two requests, but waits for ever for the first and
    for the rest of a head that has begun.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        keep_little(transport)
        self.app_state = self.app_state | {OPEN: len(self.connections)}
        self._head_bytes = 0  # since the last whole head or piece of a body
        self._wait()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > HEAD_BYTES and hasattr(self, "parser"):  # httptools
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        super().on_headers_complete()  # type: ignore[misc]

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)  # type: ignore[misc]

    def _wait(self) -> None:
        self.loop.call_later(HEADERS_S, self._look, self._last_answered())

    def _last_answered(self) -> object:
        """None before the first request; of its own kind while one is being answered."""
        return self if self.cycle and not self.cycle.response_complete else self.cycle

    def _look(self, before: object) -> None:
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            return  # gone, or a WebSocket by now
        if before is self or before is not self._last_answered():
            self._wait()
        else:
            self.transport.close()


class PatientWebSocket(GivesUp, WebSocketProtocol):
    """A caller that reads nothing answers no ping either, but what waits for it would stay."""


def protocols(stalled_s: float) -> tuple[type[asyncio.Protocol], type[asyncio.Protocol]]:
    """Of HTTP and of WebSockets, as uvicorn makes them for each connection."""
    setting = {"stalled_s": stalled_s}
    return type("HTTP", (PatientProtocol,), setting), type("WS", (PatientWebSocket,), setting)
