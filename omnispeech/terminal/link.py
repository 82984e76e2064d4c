"""The WebSocket of a conversation; it comes back when it was lost."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from omnispeech.client import (
    ASK_FOR_KEY,
    ServerError,
    credentials,
    is_loopback,
    no_server,
    with_scheme,
)

Event = dict[str, Any]

COME_BACK_S = 30.0  # the server keeps a lost conversation for as long
PAUSES_S = (0.25, 0.5, 1.0, 2.0, 4.0)  # between attempts, the last one again and again
OPEN_S = 10.0
PING_S = 5.0
PONG_S = 10.0
LOST = "connection.lost"  # an event of ours among those of the server
KEY, LATER = 1008, 1013
ENDS = {
    1000: "the server ended the conversation",
    1001: "the server is stopping",
    1009: "the server takes no frame of this size",
    1012: "the server is stopping",
    KEY: "the server refused",
    LATER: "the server refused",
}
GONE = (
    "the connection was lost and the server no longer has the conversation; "
    "start the command again for a new one"
)


class Link:
    """Enter it with `async with`. Errors are of one line: ServerError."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._session = ""
        self._lost_s: float | None = None
        self._attempts = 0
        self._outbox: asyncio.Queue[str] = asyncio.Queue()
        self._open = False
        self._why = ""  # the last attempt to come back failed

    async def __aenter__(self) -> "Link":
        self._socket = await self._connect()
        self._sending = asyncio.create_task(self._send_all())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sending.cancel()
        with suppress(WebSocketException, OSError):
            await self._socket.close()

    def send(self, kind: str, **fields: Any) -> None:
        """In order, as soon as it can be; while the connection is lost it is dropped."""
        if self._open:
            self._outbox.put_nowait(json.dumps({"type": kind, **fields}))

    async def events(self) -> AsyncIterator[Event]:
        """Those of the server, and {"type": LOST} before each attempt to come back."""
        while True:
            try:
                while True:
                    yield self._taken(json.loads(await self._socket.recv()))
            except ConnectionClosed as exc:
                self._lose(exc)
            yield {"type": LOST}
            await self._come_back()

    def _taken(self, event: Event) -> Event:
        if event["type"] == "session.created":
            self._session = event["session"]["id"]
            self._open, self._lost_s, self._attempts = True, None, 0
        elif event["type"] == "error" and event["error"]["code"] == "session_expired":
            raise ServerError(GONE)
        return event

    def _lose(self, exc: ConnectionClosed) -> None:
        """Raises ServerError if the server meant it."""
        self._open = False
        while not self._outbox.empty():
            self._outbox.get_nowait()
        code, reason = (exc.rcvd.code, exc.rcvd.reason) if exc.rcvd else (None, "")
        starting = code == LATER and self._session  # it was there, so it will be again
        if code not in ENDS or starting:
            self._why = reason or "it broke off"
            return
        advice = ASK_FOR_KEY if code == KEY and "key" in reason else ""
        raise ServerError(f"{ENDS[code]}{': ' if reason else ''}{reason}{advice}")

    async def _come_back(self) -> None:
        """Returns when there is a socket; raises ServerError when it has been too long."""
        loop = asyncio.get_running_loop()
        if self._lost_s is None:
            self._lost_s = loop.time()
        while loop.time() - self._lost_s < COME_BACK_S:
            await asyncio.sleep(PAUSES_S[min(self._attempts, len(PAUSES_S) - 1)])
            self._attempts += 1
            try:
                self._socket = await self._connect()
                return
            except ServerError as exc:
                self._why = str(exc)
        raise ServerError(
            f"the connection was lost and did not come back within {COME_BACK_S:g} s: {self._why}"
        )

    async def _connect(self) -> ClientConnection:
        address = with_scheme(self._server)
        try:
            return await connect(
                self._url(address),
                additional_headers=credentials(),
                compression=None,
                max_size=None,
                open_timeout=OPEN_S,
                ping_interval=PING_S,
                ping_timeout=PONG_S,
                proxy=None if is_loopback(address) else True,
            )
        except InvalidStatus as exc:
            status = exc.response.status_code
            raise ServerError(
                f"the server refused ({status}): {address} offers no /v1/realtime"
            ) from exc
        except (OSError, TimeoutError) as exc:
            raise no_server(self._server, exc) from exc
        except (WebSocketException, ValueError, httpx.InvalidURL) as exc:
            raise ServerError(f"{address}: the connection failed: {exc}") from exc

    def _url(self, address: str) -> str:
        query = {"model": "omnispeech"} | ({"resume": self._session} if self._session else {})
        scheme, _, rest = address.partition("://")
        if scheme not in ("http", "https", "ws", "wss"):
            raise ValueError(f"{scheme}:// is no address of a server; give http:// or https://")
        secure = "wss" if scheme in ("https", "wss") else "ws"
        return f"{secure}://{rest}/v1/realtime?{urlencode(query)}"

    async def _send_all(self) -> None:
        while True:
            text = await self._outbox.get()
            with suppress(ConnectionClosed):  # who reads notices it too
                await self._socket.send(text)
