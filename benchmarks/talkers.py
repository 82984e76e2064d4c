"""People who talk to a server, each by one protocol: they interrupt, lose connections, leave."""

import asyncio
import json
import random
import time
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from benchmarks.questions import Question
from omnispeech.audio.io import encode_wav, pcm16_from_samples
from omnispeech.audio.resample import Resampler

RATE_HZ = 24_000  # of the sound on /v1/realtime
HEARS_HZ = 16_000  # of /ws/stream
FRAME_S = 0.04
INTERRUPTION_S = 1.2
STALL_S = 2.0  # in one reply, with nothing left to hear
LONGEST_S = 60.0  # for one step of a turn
MANUAL = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}


class Wrong(Exception):
    """What must not happen."""


@dataclass(slots=True)
class Notes:
    """What all talkers saw."""

    turns: dict[str, int] = field(default_factory=dict)
    right: dict[str, list[bool]] = field(default_factory=dict)  # of whole answers
    mistakes: list[str] = field(default_factory=list)
    interrupted: int = 0
    lost: int = 0
    resumed: int = 0
    first_audio_s: list[float] = field(default_factory=list)
    dry_s: list[float] = field(default_factory=list)  # of each whole reply
    stalled: int = 0
    longest_gap_s: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def turn(self, protocol: str) -> None:
        self.turns[protocol] = self.turns.get(protocol, 0) + 1

    def answered(self, protocol: str, speech: "Speech", said: str) -> None:
        right = said == speech.answer
        self.right.setdefault(protocol, []).append(right)
        if not right:
            self.mistakes.append(f"{protocol}: {said!r}, not {speech.answer!r}")


@dataclass(slots=True)
class Listener:
    """Plays from the first piece of sound on, and notes how long there was nothing to play."""

    notes: Notes
    asked_s: float = field(default_factory=time.monotonic)
    heard_until_s: float = 0.0
    dry_s: float = 0.0

    def hear(self, seconds: float) -> None:
        now_s = time.monotonic()
        if not self.heard_until_s:
            self.notes.first_audio_s.append(now_s - self.asked_s)
            self.heard_until_s = now_s
        gap_s = max(0.0, now_s - self.heard_until_s)
        self.dry_s += gap_s
        self.notes.longest_gap_s = max(self.notes.longest_gap_s, gap_s)
        self.heard_until_s = max(self.heard_until_s, now_s) + seconds

    def end(self) -> None:
        if self.heard_until_s:
            self.notes.dry_s.append(self.dry_s)
        self.notes.stalled += self.dry_s > STALL_S

    @property
    def left_s(self) -> float:
        return max(0.0, self.heard_until_s - time.monotonic())


@dataclass(frozen=True, slots=True)
class Speech:
    """One spoken question in the forms that the protocols want, and its right answer."""

    pcm_16k: bytes
    pcm_24k: bytes
    answer: str

    @classmethod
    def of(cls, question: Question) -> "Speech":
        resampler = Resampler(HEARS_HZ, RATE_HZ)
        whole = np.concatenate([resampler.push(question.samples), resampler.finish()])
        pcm_16k = pcm16_from_samples(question.samples)
        return cls(pcm_16k, pcm16_from_samples(whole), question.answer)

    @property
    def wav(self) -> bytes:
        return encode_wav(self.pcm_16k, HEARS_HZ)


@dataclass(frozen=True, slots=True)
class Habits:
    """chance: decides what is asked, who interrupts, leaves, loses the connection. pause_s: between
    two turns."""

    chance: random.Random
    pause_s: float
    questions: Sequence[Speech]

    def sometimes(self, share: float) -> bool:
        return self.chance.random() < share

    def question(self) -> Speech:
        return self.chance.choice(self.questions)

    async def pause(self) -> None:
        await asyncio.sleep(self.pause_s * self.chance.uniform(0.2, 1.8))


class Microphone:
    """Sends sound in real time, as one does: what is said, else silence."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._frames: deque[bytes] = deque()
        self._task = asyncio.create_task(self._run())

    def say(self, pcm: bytes) -> None:
        step = int(FRAME_S * RATE_HZ) * 2
        self._frames.extend(pcm[place : place + step] for place in range(0, len(pcm), step))

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        silence, due_s = bytes(int(FRAME_S * RATE_HZ) * 2), time.monotonic()
        with suppress(ConnectionClosed):
            while True:
                pcm = self._frames.popleft() if self._frames else silence
                await send(self._socket, "input_audio_buffer.append", audio=in_base64(pcm))
                due_s += FRAME_S
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))


class RealtimeTalker:
    """One talk of many turns on /v1/realtime, hands-free or by its own commits."""

    def __init__(self, url: str, notes: Notes, habits: Habits) -> None:
        self._url = f"{url.replace('http', 'ws', 1)}/v1/realtime"
        self._notes = notes
        self._habits = habits
        self._session = ""

    async def talk(self, until_s: float, *, hands_free: bool) -> None:
        """Over as many connections as it takes: some are lost in the middle."""
        while time.monotonic() < until_s:
            async with self._connected() as socket:
                if hands_free:
                    await self._speak_freely(socket, until_s)
                else:
                    await self._press_to_talk(socket, until_s)
        async with self._connected():
            pass  # an ordinary goodbye

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[ClientConnection]:
        before = self._session
        async with connect(self._url + (f"?resume={before}" if before else "")) as socket:
            self._session = (await awaited(socket, "session.created"))["session"]["id"]
            if before and self._session != before:
                raise Wrong("a talk was not taken up again")
            self._notes.resumed += bool(before)
            yield socket

    async def _lose(self, socket: ClientConnection) -> None:
        """As a phone does that leaves its network; the talk must be there afterwards."""
        socket.transport.abort()
        await socket.wait_closed()
        self._notes.lost += 1
        await asyncio.sleep(self._habits.chance.uniform(0.1, 3.0))

    async def _speak_freely(self, socket: ClientConnection, until_s: float) -> None:
        microphone = Microphone(socket)
        try:
            while time.monotonic() < until_s and not self._habits.sometimes(0.1):
                await self._spoken_turn(socket, microphone)
                await self._habits.pause()
        finally:
            await microphone.stop()
        await self._lose(socket)

    async def _spoken_turn(self, socket: ClientConnection, microphone: Microphone) -> None:
        """The server finds the end. Sometimes a second question cuts the reply to the first."""
        cutting, speech = self._habits.sometimes(0.3), self._habits.question()
        microphone.say(speech.pcm_24k)
        await awaited(socket, "input_audio_buffer.committed")

        async def interrupt() -> None:
            microphone.say(speech.pcm_24k[: int(INTERRUPTION_S * RATE_HZ) * 2])

        await self._listen(socket, "realtime, hands-free", speech, interrupt if cutting else None)
        if cutting:  # by half a question: whatever is said to it is right
            await self._listen(socket, "realtime, hands-free", None, None)

    async def _press_to_talk(self, socket: ClientConnection, until_s: float) -> None:
        await send(socket, "session.update", session=MANUAL)
        await awaited(socket, "session.updated")
        while time.monotonic() < until_s and not self._habits.sometimes(0.1):
            speech = self._habits.question()
            await send(socket, "input_audio_buffer.append", audio=in_base64(speech.pcm_24k))
            await send(socket, "input_audio_buffer.commit")
            await send(socket, "response.create")

            async def interrupt() -> None:
                await send(socket, "response.cancel")

            cutting = self._habits.sometimes(0.3)
            await self._listen(socket, "realtime, manual", speech, interrupt if cutting else None)
            await self._habits.pause()
        await self._lose(socket)

    async def _listen(
        self,
        socket: ClientConnection,
        protocol: str,
        speech: Speech | None,
        interrupt: Callable[[], Awaitable[None]] | None,
    ) -> None:
        """To the end of one reply, to `speech`; `interrupt` is done at its first sound."""
        listener = Listener(self._notes)
        async for event in events(socket):
            if event["type"] == "response.output_audio.delta":
                listener.hear(len(b64decode(event["delta"])) / 2 / RATE_HZ)
                if interrupt:
                    await interrupt()
                    interrupt = None
            elif event["type"] == "response.done":
                if self._is_whole(event["response"]):
                    listener.end()
                    if speech:
                        self._notes.answered(protocol, speech, transcript(event["response"]))
                break
        self._notes.turn(protocol)
        await asyncio.sleep(listener.left_s)

    def _is_whole(self, response: dict[str, Any]) -> bool:
        if response["status"] == "failed":
            raise Wrong(json.dumps(response["status_details"]))
        self._notes.interrupted += response["status"] == "cancelled"
        return bool(response["status"] != "cancelled")


def transcript(response: dict[str, Any]) -> str:
    return "".join(part["transcript"] for item in response["output"] for part in item["content"])


def in_base64(sound: bytes) -> str:
    return b64encode(sound).decode()


async def send(socket: ClientConnection, kind: str, **fields: Any) -> None:
    await socket.send(json.dumps({"type": kind, **fields}))


async def awaited(socket: ClientConnection, kind: str) -> dict[str, Any]:
    async for event in events(socket):
        if event["type"] == kind:
            return event
    raise Wrong(f"the connection ended before {kind}")


async def events(socket: ClientConnection) -> AsyncIterator[dict[str, Any]]:
    while True:
        event = json.loads(await asyncio.wait_for(socket.recv(), LONGEST_S))
        if event["type"] == "error" and event["error"]["code"] != "response_cancel_not_active":
            raise Wrong(json.dumps(event["error"]))
        yield event


class RequestTalker:
    """One question after the other over HTTP; leaves some replies before their end."""

    def __init__(self, url: str, notes: Notes, habits: Habits) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=LONGEST_S, trust_env=False)
        self._notes = notes
        self._habits = habits

    async def talk(self, until_s: float, *, protocol: str) -> None:
        async with self._client:
            while time.monotonic() < until_s:
                listener = await self._ask(protocol, self._habits.question())
                self._notes.turn(protocol)
                await asyncio.sleep(listener.left_s)
                await self._habits.pause()

    async def _ask(self, protocol: str, speech: Speech) -> Listener:
        path, request, rate_hz = posted(protocol, speech)
        listener, leaving, said = Listener(self._notes), self._habits.sometimes(0.2), ""
        async with self._client.stream("POST", path, **request) as response:
            if response.is_error:
                raise Wrong(f"{path}: {response.status_code} {(await response.aread())[:200]!r}")
            async for text, pcm_bytes in reply_of(response):
                said += text
                if pcm_bytes:
                    listener.hear(pcm_bytes / 2 / rate_hz)
                if pcm_bytes and leaving:
                    self._notes.interrupted += 1
                    return Listener(self._notes)
        listener.end()
        if protocol == "speech":
            said = (await self._client.get(f"/v1/speech/{response.headers['x-turn-id']}")).json()[
                "text"
            ]
        if protocol != "read aloud":  # it has no text but the one that was sent
            self._notes.answered(protocol, speech, said)
        return listener


def posted(protocol: str, speech: Speech) -> tuple[str, dict[str, Any], int]:
    """Path, body, and the rate of the PCM that comes back."""
    if protocol == "speech":
        return "/v1/speech?format=pcm", {"content": speech.wav}, 22_050
    if protocol == "read aloud":
        body = {"model": "omnispeech", "voice": "default", "response_format": "pcm"}
        return "/v1/audio/speech", {"json": body | {"input": speech.answer}}, RATE_HZ
    return "/v1/chat/completions", {"json": chat(speech)}, RATE_HZ


def chat(speech: Speech) -> dict[str, Any]:
    sound = {"data": in_base64(speech.wav), "format": "wav"}
    question = {"role": "user", "content": [{"type": "input_audio", "input_audio": sound}]}
    return {
        "model": "omnispeech",
        "modalities": ["text", "audio"],
        "audio": {"voice": "default", "format": "pcm16"},
        "messages": [question],
        "stream": True,
    }


async def reply_of(response: httpx.Response) -> AsyncIterator[tuple[str, int]]:
    """Text, and bytes of PCM, as they come, of a raw stream or of server-sent events."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        async for piece in response.aiter_raw():
            yield "", len(piece)
        return
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise Wrong(json.dumps(chunk["error"]))
            for choice in chunk["choices"]:
                audio = choice["delta"].get("audio") or {}
                yield audio.get("transcript", ""), len(b64decode(audio.get("data", "")))


class WindowTalker:
    """/ws/stream: sound in, a trigger, sound out."""

    def __init__(self, url: str, notes: Notes, habits: Habits) -> None:
        self._url = f"{url.replace('http', 'ws', 1)}/ws/stream?events=1"
        self._notes = notes
        self._habits = habits

    async def talk(self, until_s: float) -> None:
        async with connect(self._url) as socket:
            while time.monotonic() < until_s:
                speech = self._habits.question()
                await socket.send(speech.pcm_16k)
                await socket.send(json.dumps({"type": "trigger_response"}))
                listener = await self._listen(socket, speech)
                self._notes.turn("ws/stream")
                await asyncio.sleep(listener.left_s)
                await self._habits.pause()

    async def _listen(self, socket: ClientConnection, speech: Speech) -> Listener:
        listener, said = Listener(self._notes), ""
        while True:
            frame = await asyncio.wait_for(socket.recv(), LONGEST_S)
            if isinstance(frame, bytes):
                listener.hear((len(frame) - 48) / 2 / 22_050)  # 4 of length, 44 of WAV header
            elif (event := json.loads(frame))["type"] == "error":
                raise Wrong(event["message"])
            elif event["type"] == "text":
                said += event["text"]
            elif event["type"] == "end":
                break
        listener.end()
        self._notes.answered("ws/stream", speech, said)
        return listener
