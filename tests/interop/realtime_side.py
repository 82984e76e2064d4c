"""What the realtime scripts beside this have in common: a microphone, and a report.

Runs in the environments of the clients: the standard library alone.
"""

import asyncio
import json
import logging
import sys
import wave
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

PIECE_S = 0.02
LIMIT_S = 60.0  # of a wait


@dataclass
class Answer:
    text: str = ""
    sound: int = 0  # bytes of 16 bit PCM at 24 kHz
    done: bool = False
    cut: bool = False


@dataclass
class Report:
    """Printed as the last line."""

    answers: list[Answer] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)  # of the function
    errors: list[str] = field(default_factory=list)  # what the client showed its user
    logged: list[str] = field(default_factory=list)  # warnings and worse
    closed: bool = False

    def print(self) -> None:
        sys.stdout.write(json.dumps(asdict(self)) + "\n")


class Microphone:
    """A WAV of 24 kHz; silent but for the question when it is asked."""

    def __init__(self, path: str) -> None:
        with wave.open(path) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
            self._question = file.readframes(file.getnframes())
        self._rest = b""

    def ask(self) -> None:
        self._rest = self._question

    async def pieces(self) -> AsyncIterator[bytes]:
        """In real time, for ever"""
        size = 2 * int(24_000 * PIECE_S)
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            piece, self._rest = self._rest[:size], self._rest[size:]
            yield piece.ljust(size, b"\0")
            due += PIECE_S
            await asyncio.sleep(max(0.0, due - loop.time()))


class Keeper(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(f"{record.name} {record.levelname} {record.getMessage()}")


def keep_logs(report: Report) -> None:
    logging.getLogger().addHandler(Keeper(report.logged))


async def until(true: Callable[[], Any], what: str) -> None:
    """Raises TimeoutError that says what did not come."""
    end = asyncio.get_running_loop().time() + LIMIT_S
    while not true():
        if asyncio.get_running_loop().time() > end:
            raise TimeoutError(what)
        await asyncio.sleep(0.01)


async def play_out(answer: Answer) -> None:
    """Waits for as long as a listener would, who does not interrupt."""
    await asyncio.sleep(answer.sound / 48_000)


def arguments() -> tuple[str, str, list[str]]:
    """SCRIPT.py URL WAV STEP...: each step is turn, call or interrupt. URL: http://host:port"""
    url, path, *steps = sys.argv[1:]
    assert set(steps) <= {"turn", "call", "interrupt"}, steps
    return url, path, steps
