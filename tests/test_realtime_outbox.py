import asyncio
import json
from typing import Any

import pytest
from fastapi import WebSocketDisconnect

from omnispeech.server.realtime.outbox import Outbox


class Socket:
    """Takes what it is sent while it is `open`."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.got: list[Any] = []
        self.lost = False

    async def send_text(self, text: str) -> None:
        await self.open.wait()
        if self.lost:
            raise WebSocketDisconnect
        self.got.append(json.loads(text)["n"])


def numbered(outbox: Outbox, numbers: range, of: object = None, sent: Any = None) -> None:
    for n in numbers:
        outbox.put({"n": n}, of, sent)


async def sent_by(outbox: Outbox, socket: Socket) -> list[Any]:
    socket.open.set()
    outbox.close()
    await outbox.run()
    return socket.got


async def test_events_are_sent_in_order_and_nothing_after_the_close() -> None:
    socket = Socket()
    outbox = Outbox(socket)  # type: ignore[arg-type]
    numbered(outbox, range(5))
    assert await sent_by(outbox, socket) == [0, 1, 2, 3, 4]
    numbered(outbox, range(5, 9))
    assert await sent_by(outbox, socket) == [0, 1, 2, 3, 4]


async def test_what_is_taken_back_is_not_sent_and_does_not_count() -> None:
    socket, reply, told = Socket(), object(), []
    outbox = Outbox(socket)  # type: ignore[arg-type]
    numbered(outbox, range(2))
    numbered(outbox, range(2, 4), reply, lambda: told.append("sent"))
    numbered(outbox, range(4, 6))
    outbox.take_back(reply)
    assert await sent_by(outbox, socket) == [0, 1, 4, 5]
    assert told == []


@pytest.mark.parametrize("way", ["sending", "taking back", "closing"])
async def test_whoever_waits_for_room_goes_on_when_there_is_some(way: str) -> None:
    socket, reply = Socket(), object()
    outbox = Outbox(socket)  # type: ignore[arg-type]
    running = asyncio.create_task(outbox.run())
    numbered(outbox, range(100), reply)
    waiting = asyncio.create_task(outbox.room(1000))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    if way == "sending":
        socket.open.set()
    elif way == "taking back":
        outbox.take_back(reply)
    else:
        outbox.close()
    await asyncio.wait_for(waiting, 1)
    running.cancel()


async def test_a_lost_connection_ends_the_sending() -> None:
    socket = Socket()
    socket.lost = True
    outbox = Outbox(socket)  # type: ignore[arg-type]
    numbered(outbox, range(3))
    socket.open.set()
    await asyncio.wait_for(outbox.run(), 1)
    numbered(outbox, range(3))
    await asyncio.wait_for(outbox.room(0), 1)
    assert socket.got == []
