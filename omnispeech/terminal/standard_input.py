"""Standard input while a conversation runs, read in a thread that ends with the program."""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

PIECE = 4096  # bytes
AHEAD = 4  # pieces


async def pieces(descriptor: int) -> AsyncIterator[bytes]:
    """As they come, until the end of the input."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    room = threading.Semaphore(AHEAD)

    def read() -> None:
        data = b"-"
        with suppress(RuntimeError):  # the conversation is over
            while data:
                room.acquire()
                data = os.read(descriptor, PIECE)
                loop.call_soon_threadsafe(queue.put_nowait, data)

    threading.Thread(target=read, name="standard input", daemon=True).start()
    while data := await queue.get():
        room.release()
        yield data


async def lines(descriptor: int) -> AsyncIterator[str]:
    """Without their ends; what stands last counts too."""
    rest = b""
    async for data in pieces(descriptor):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace").strip()
    if rest:
        yield rest.decode(errors="replace").strip()


@contextmanager
def silent_keys() -> Iterator[None]:
    """What is typed does not show: it would stand in the middle of the live line."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
