"""How many connections there may be, and how long and how much one may say before it is asked."""

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from omnispeech.errors import Overloaded
from omnispeech.server.access.refused import answer, refuse_websocket
from omnispeech.server.watch import Watch, Watched

PROBES = {"/health", "/ready"}  # a server that is only full is not restarted
HEADERS_S = 10.0
HEAD_BYTES = 65_536  # h11 has the same limit of its own, httptools has none
READ_AWAY_S = 2.0
OPEN = "connections"  # in the state of a scope: how many were open when this one was made

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol
else:  # of the parser that is installed
    from uvicorn.protocols.http.auto import AutoHTTPProtocol as Protocol


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


class PatientProtocol(Protocol):
    """Ends a connection that sends no whole request head for HEADERS_S, or one over HEAD_BYTES.

    uvicorn closes one that is silent between two requests, but waits for ever for the first and
    for the rest of a head that has begun.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
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
