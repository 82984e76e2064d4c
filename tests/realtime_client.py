"""A client of /v1/realtime that writes down all it is told, on a real WebSocket on loopback."""

import asyncio
import json
import re
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
from fake_engine import FakeEngine, serving
from realtime_order import check_order
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from omnispeech.audio.vad import WINDOW
from omnispeech.config import TalkConfig
from omnispeech.server.app import DEFAULT_TALK

RATE_HZ = 24_000
LIMIT_S = 15.0
MANUAL = {"audio": {"input": {"turn_detection": None}}}

Event = dict[str, Any]


class Loudness:
    """In place of the speech detector: whatever is loud is speech."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sound = np.zeros(0, np.float32)

    def push(self, samples: np.ndarray) -> list[float]:
        self._sound = np.concatenate([self._sound, samples])
        whole = len(self._sound) // WINDOW * WINDOW
        windows, self._sound = self._sound[:whole].reshape(-1, WINDOW), self._sound[whole:]
        return [float(np.abs(window).mean() > 0.05) for window in windows]


class RealtimeClient:
    def __init__(self, socket: ClientConnection, url: str) -> None:
        self.socket = socket
        self.url = url
        self.got: list[Event] = []  # all events, in order

    async def send(self, kind: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": kind, **fields}))

    async def next(self, limit_s: float = LIMIT_S) -> Event:
        frame = await asyncio.wait_for(self.socket.recv(), limit_s)
        assert isinstance(frame, str) and len(frame) < 1_000_000
        self.got.append(json.loads(frame))
        return self.got[-1]

    async def until(self, kind: str, limit_s: float = LIMIT_S) -> Event:
        """The next event of that type; what comes before it is in `got`."""
        while (event := await self.next(limit_s))["type"] != kind:
            pass
        return event

    async def sync(self) -> None:
        """Until the server has taken all that was sent."""
        mark = f"sync {len(self.got)}"
        await self.send("conversation.item.retrieve", item_id="none", event_id=mark)
        while (await self.error())["event_id"] != mark:
            pass

    async def metrics(self) -> str:
        async with httpx.AsyncClient() as client:
            return (await client.get(f"{self.url}/metrics")).text

    async def closed(self) -> tuple[int, str]:
        """Reads until the server closes: its code and reason."""
        try:
            while True:
                await self.next()
        except ConnectionClosed as exc:
            assert exc.rcvd
            return exc.rcvd.code, exc.rcvd.reason

    async def lose(self) -> None:
        """The connection, as when a phone leaves its network: without a close frame."""
        talks = await self.talks()
        self.socket.transport.abort()
        await self.socket.wait_closed()
        while await self.talks() == talks:
            await asyncio.sleep(0.005)

    async def talks(self) -> int:
        """How many are connected to the server."""
        (line,) = re.findall(
            r'^omnispeech_talks{state="connected"} (.*)$', await self.metrics(), re.M
        )
        return int(float(line))

    async def begin(self, **session: Any) -> Event:
        """session.created, and an update if there is something to change."""
        created = await self.until("session.created")
        if session:
            await self.send("session.update", session={"type": "realtime", **session})
            await self.until("session.updated")
        return created["session"]

    async def append(self, samples: np.ndarray) -> None:
        """[N] at 24 kHz, in [-1, 1]"""
        await self.send("input_audio_buffer.append", audio=encoded(samples))

    async def say(self, seconds: float = 0.3) -> Event:
        """A manual turn up to its item."""
        await self.append(noise(seconds))
        await self.send("input_audio_buffer.commit")
        return (await self.until("conversation.item.done"))["item"]

    async def write(self, text: str) -> Event:
        """The same in writing."""
        part = {"type": "input_text", "text": text}
        item = {"type": "message", "role": "user", "content": [part]}
        await self.send("conversation.item.create", item=item)
        return (await self.until("conversation.item.done"))["item"]

    async def reply(self, **response: Any) -> Event:
        """The whole of one: its response.done."""
        await self.send("response.create", **({"response": response} if response else {}))
        return (await self.until("response.done"))["response"]

    async def error(self) -> Event:
        return (await self.until("error"))["error"]

    def types(self) -> list[str]:
        return [event["type"] for event in self.got]

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.got if event["type"] == kind]

    def sound(self) -> np.ndarray:
        """[N] int16: all that was heard"""
        deltas = self.of("response.output_audio.delta")
        return np.frombuffer(b"".join(b64decode(event["delta"]) for event in deltas), "<i2")

    def transcript(self) -> str:
        deltas = self.of("response.output_audio_transcript.delta")
        return "".join(event["delta"] for event in deltas)


def encoded(samples: np.ndarray) -> str:
    return b64encode((samples * 32767).astype("<i2").tobytes()).decode()


def noise(seconds: float) -> np.ndarray:
    """[N] at 24 kHz: what a detector that goes by loudness takes for speech."""
    return np.random.default_rng(0).uniform(-0.5, 0.5, int(seconds * RATE_HZ))


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * RATE_HZ))


@asynccontextmanager
async def connected(
    url: str, query: str = "?model=any", **options: Any
) -> AsyncIterator[RealtimeClient]:
    """url: of `serving`"""
    address = url.replace("http", "ws", 1) + "/v1/realtime" + query
    async with connect(address, **{"max_size": None, "max_queue": None, **options}) as socket:
        client = RealtimeClient(socket, url)
        yield client
    if client.types()[:1] == ["session.created"] and "resume=" not in query:
        check_order(client.got)


@asynccontextmanager
async def talking(
    engine: FakeEngine,
    talk: TalkConfig = DEFAULT_TALK,
    query: str = "?model=any",
    max_queue: int | None = None,
    **settings: Any,
) -> AsyncIterator[RealtimeClient]:
    """max_queue: frames that a client takes before it asks for them; None: all."""
    with serving(engine, talk, **settings) as url:
        async with connected(url, query, max_queue=max_queue) as client:
            yield client
