"""What is on its way to one client: in order, each with an id of its own."""

import asyncio
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from omnispeech.server.realtime.protocol.ids import new_id

# characters that may wait for a slow client: replies stop before events do, so that it can still
# interrupt them
REPLY_ROOM, EVENT_ROOM = 4_000_000, 8_000_000

ServerEvent = dict[str, Any]


@dataclass(slots=True)
class Letter:
    text: str
    of: object  # who may take it back
    sent: Callable[[], None] | None


class Outbox:
    """The only one that sends to its socket."""

    def __init__(self, socket: WebSocket | None) -> None:
        self._socket = socket
        self._waiting: deque[Letter] = deque()
        self._size = 0  # characters
        self._filled = asyncio.Event()
        self._emptier = asyncio.Event()
        self._closed = False

    @classmethod
    def closed(cls) -> "Outbox":
        """Nobody is there: what is put into it is lost."""
        outbox = cls(None)
        outbox.close()
        return outbox

    def put(
        self, event: ServerEvent, of: object = None, sent: Callable[[], None] | None = None
    ) -> None:
        """sent: called when the event can no longer be taken back."""
        if self._closed:
            return
        letter = Letter(json.dumps({"event_id": new_id("event"), **event}), of, sent)
        self._waiting.append(letter)
        self._size += len(letter.text)
        self._filled.set()

    def take_back(self, of: object) -> None:
        """What was put for `of` and has not been sent will not be."""
        self._waiting = deque(letter for letter in self._waiting if letter.of is not of)
        self._size = sum(len(letter.text) for letter in self._waiting)
        self._emptier.set()

    async def room(self, size: int) -> None:
        """Until no more than so many characters wait."""
        while self._size > size and not self._closed:
            self._emptier.clear()
            await self._emptier.wait()

    async def run(self) -> None:
        """Sends until `close`, then what is left; ends early when the client is gone."""
        assert self._socket is not None
        try:
            while await self._more():
                letter = self._waiting.popleft()
                self._size -= len(letter.text)
                self._emptier.set()
                if letter.sent:
                    letter.sent()
                await self._socket.send_text(letter.text)
        except (WebSocketDisconnect, RuntimeError):  # starlette's two words for a lost connection
            self.drop()

    async def _more(self) -> bool:
        while not self._waiting and not self._closed:
            self._filled.clear()
            await self._filled.wait()
        return bool(self._waiting)

    def close(self) -> None:
        """Nothing is taken any more."""
        self._closed = True
        self._filled.set()
        self._emptier.set()

    def drop(self) -> None:
        self.close()
        self._waiting.clear()
        self._size = 0
