"""How many connections there may be, and how long one may take to say what it wants."""

import asyncio
from collections.abc import Collection
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from omnispeech.errors import Overloaded
from omnispeech.server.access.refused import answer, refuse_websocket

PROBES = {"/health", "/ready"}  # a server that is only full is not restarted
HEADERS_S = 10.0

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol
else:  # of the parser that is installed
    from uvicorn.protocols.http.auto import AutoHTTPProtocol as Protocol


class Crowd:
    """ASGI, before everything else: one connection too many is told so, and closed.

    open: the connections of the server, this one among them.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self.open: Collection[object] = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self.open) <= self._most or scope.get("path") in PROBES or "path" not in scope:
            await self._app(scope, receive, send)
            return
        full = Overloaded(f"{self._most} connections are open, the most there may be; come again")
        if scope["type"] == "websocket":
            await refuse_websocket(full, scope, receive, send)
            return
        response = answer(full, scope["path"])
        response.headers["Connection"] = "close"
        await response(scope, receive, send)


class PatientProtocol(Protocol):
    """Ends a connection that sends no whole request head for HEADERS_S.

    uvicorn closes one that is silent between two requests, but waits for ever for the first and
    for the rest of a head that has begun.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

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
