"""bench.py fronts: what Ray Serve's proxy adds to each block of sound, against plain uvicorn.

    python bench.py fronts --conversations 1 8 32

Both serve the same application around an engine that makes no sound but blocks of bytes at a fixed
pace, so that nothing but the way to the listener is measured. Each block carries the time at which
it was made, by a clock that the processes of one machine share.
"""

import argparse
import asyncio
import multiprocessing
import statistics
import struct
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
import websockets

from benchmarks.hardware import hardware, say
from omnispeech.commands.scale import prepare_environment
from omnispeech.config import ScaleConfig, ServerConfig
from omnispeech.engine.events import AudioDelta, Done, EngineStatus, Event, TurnRequest
from omnispeech.once import free_port
from omnispeech.server.app import create_app
from omnispeech.service import settings_of

QUESTION = Path(__file__).parent.parent / "examples" / "question.wav"
BLOCK = 35_280  # bytes: 0.8 s of PCM16 at 22.05 kHz, ten units
SPOKEN = 3_200  # bytes of one message: 0.1 s of PCM16 at 16 kHz
CLOCK = struct.Struct("<q")
DONE = Done(
    text_finish="stop",
    speech_finish="stop",
    prompt_tokens=0,
    text_tokens=0,
    units=0,
    seed=0,
    first_text_s=0.0,
    first_audio_s=0.0,
    total_s=0.0,
    audio_s=0.0,
)


class PacedEngine:
    """A request asks for `max_new_tokens` blocks, one every `seed` milliseconds."""

    sample_rate_hz = 22_050

    def status(self) -> EngineStatus:
        return EngineStatus(ready=True)

    async def answer(self, request: TurnRequest) -> AsyncGenerator[Event, None]:
        began = time.monotonic()
        for block in range(request.max_new_tokens):
            due = began + block * (request.seed or 0) / 1000
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            yield AudioDelta(CLOCK.pack(time.monotonic_ns()).ljust(BLOCK, b"\0"))
        yield DONE


class PacedReplica:
    def __serve_build_asgi_app__(self) -> object:
        return create_app(PacedEngine(), ServerConfig())


@dataclass(frozen=True, slots=True)
class Heard:
    """One reply: seconds from the request to its first block, and on the way, of each block."""

    first_s: float
    ways_s: tuple[float, ...]


async def listen(client: httpx.AsyncClient, blocks: int, pace_ms: int) -> Heard:
    query: dict[str, str | int] = {"format": "pcm", "max_new_tokens": blocks, "seed": pace_ms}
    began, waiting, ways, first_s = time.monotonic(), bytearray(), [], 0.0
    body = QUESTION.read_bytes()
    async with client.stream("POST", "/v1/speech", params=query, content=body) as reply:
        reply.raise_for_status()
        async for piece in reply.aiter_raw():
            waiting += piece
            while len(waiting) >= BLOCK:
                (made_ns,) = CLOCK.unpack_from(waiting)
                ways.append((time.monotonic_ns() - made_ns) / 1e9)
                first_s = first_s or time.monotonic() - began
                del waiting[:BLOCK]
    assert len(ways) == blocks, f"{len(ways)} of {blocks} blocks came"
    return Heard(first_s, tuple(ways))


async def speak(url: str, messages: int) -> None:
    """Sound goes in as fast as it is taken; what cannot be obeyed is answered behind all of it."""
    address = f"{url.replace('http', 'ws', 1)}/ws/stream?events=1"
    async with websockets.connect(address) as socket:
        for _ in range(messages):
            await socket.send(bytes(SPOKEN))
        await socket.send('{"type": "nothing"}')
        await socket.recv()


async def measure(url: str, conversations: int, args: argparse.Namespace) -> list[float]:
    """First block, median and 99 % way of a block (ms); then unpaced: replies/s and MB/s out, and
    messages/s in."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60.0, limits=limits) as client:

        async def together(blocks: int, pace_ms: int) -> tuple[list[Heard], float]:
            began = time.monotonic()
            tasks = (listen(client, blocks, pace_ms) for _ in range(conversations))
            return await asyncio.gather(*tasks), time.monotonic() - began

        await together(1, 0)
        paced, _ = await together(args.blocks, args.pace_ms)
        ways = sorted(way for heard in paced for way in heard.ways_s)
        _, short_s = await together(1, 0)
        _, long_s = await together(args.blocks, 0)
    began = time.monotonic()
    await asyncio.gather(*(speak(url, args.messages) for _ in range(conversations)))
    in_s = time.monotonic() - began
    return [
        1000 * statistics.median(heard.first_s for heard in paced),
        1000 * statistics.median(ways),
        1000 * ways[int(0.99 * (len(ways) - 1))],
        conversations / short_s,
        conversations * args.blocks * BLOCK / long_s / 1e6,
        conversations * args.messages / in_s,
    ]


def serve_plainly(port: int) -> None:
    import uvicorn

    app = create_app(PacedEngine(), ServerConfig())
    uvicorn.run(app, port=port, log_level="critical")


@contextmanager
def served_with_ray(port: int, replicas: int) -> Iterator[None]:
    from ray import serve

    from omnispeech.ray_deployment import cluster

    with cluster(settings_of({"port": port}, {}), ScaleConfig()):
        deployment = serve.deployment(
            num_replicas=replicas,
            max_ongoing_requests=1000,
            logging_config={"enable_access_log": False},
        )
        serve.run(deployment(serve.ingress()(PacedReplica)).bind(), name="fronts")
        yield


@contextmanager
def served_plainly(port: int) -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=serve_plainly, args=(port,))
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


COLUMNS = (
    "front",
    "conversations",
    "first block (ms)",
    "way of a block, median (ms)",
    "99 % (ms)",
    "short replies/s",
    "MB/s",
    "messages in/s",
)


def table(caption: str, rows: Sequence[Sequence[object]]) -> str:
    lines = [caption, "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


async def until_served(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        while True:
            try:
                (await client.get("/health")).raise_for_status()
                return
            except httpx.HTTPError:
                await asyncio.sleep(0.1)


async def rounds(fronts: dict[str, str], args: argparse.Namespace) -> list[list[object]]:
    """The fronts in turn, so that a busy moment of the machine meets both; medians."""
    rows: list[list[object]] = []
    for conversations in args.conversations:
        figures: dict[str, list[list[float]]] = {name: [] for name in fronts}
        for _ in range(args.rounds):
            for name, url in fronts.items():
                figures[name].append(await measure(url, conversations, args))
        for name, taken in figures.items():
            rows.append([name, conversations, *map(statistics.median, zip(*taken, strict=True))])
            say(f"{name}, {conversations} conversations: done")
    return rows


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench.py fronts", description="Measures Ray's proxy.")
    parser.add_argument("--conversations", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--pace-ms", type=int, default=100)
    parser.add_argument("--messages", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    prepare_environment("local")
    ports = free_port(), free_port()
    names = "uvicorn", f"Ray Serve, {args.replicas} replicas"
    fronts = {n: f"http://127.0.0.1:{port}" for n, port in zip(names, ports, strict=True)}
    with served_plainly(ports[0]), served_with_ray(ports[1], args.replicas):
        asyncio.run(until_served(fronts["uvicorn"]))
        rows = asyncio.run(rounds(fronts, args))
    caption = (
        f"{hardware(torch.device('cpu'))}; {args.blocks} blocks of {BLOCK / 1000:g} kB, one every "
        f"{args.pace_ms} ms; medians of {args.rounds} rounds."
    )
    sys.stdout.write(table(caption, rows) + "\n")
