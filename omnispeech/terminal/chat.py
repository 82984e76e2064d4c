"""`omnispeech chat`: one conversation from its beginning to its end."""

import asyncio
import math
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from omnispeech.client import ClientError, complain
from omnispeech.errors import OmniSpeechError
from omnispeech.terminal.devices import Loudspeaker, find_sounddevice
from omnispeech.terminal.link import Link
from omnispeech.terminal.options import PIPE, ChatOptions
from omnispeech.terminal.outlets import Pipe, WavFile
from omnispeech.terminal.player import Nowhere, Player, Sink
from omnispeech.terminal.record import Record
from omnispeech.terminal.screen import screen_on
from omnispeech.terminal.sources import source_of
from omnispeech.terminal.talk import Talk

DRAW_S = 0.1
FLOOR_DB = 60.0  # below full scale: the empty level bar


def chat(options: ChatOptions) -> int:
    """The exit status."""
    try:
        return asyncio.run(converse(options))
    except (OmniSpeechError, OSError) as exc:
        return complain(exc)


async def converse(options: ChatOptions) -> int:
    screen = screen_on(sys.stderr if options.output == PIPE else sys.stdout)
    record = Record(options.save)
    source, hands_free = source_of(options)
    sink = sink_of(options)
    async with Link(options.server) as link:
        player = Player(sink or Nowhere())
        with ExitStack() as closing:
            closing.callback(player.close)
            closing.callback(screen.leave)
            session = options.session(hands_free=hands_free)
            talk = Talk(link, player, screen, record, session, to_files=not (sink or options.text))
            with stopped_by_signals(talk.replies.interrupt) as stopped:
                try:
                    await first_of(talk.run(), source(talk), draw(talk, player), stopped.wait())
                    check(player)
                finally:
                    if stopped.is_set() or sys.exc_info()[0]:
                        player.stop()
    if options.save:
        screen.line(f"saved in {options.save}")
    return talk.status


def sink_of(options: ChatOptions) -> Sink | None:
    """None: there is no loudspeaker, and no other place was named."""
    if options.output == PIPE:
        return Pipe(sys.stdout.fileno())
    if options.output:
        return WavFile(options.output)
    device = None if options.text else find_sounddevice("output")
    return Loudspeaker(device) if device else None


async def first_of(*works: Coroutine[Any, Any, Any]) -> None:
    """Until one has ended, or failed: then the others end too."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def draw(talk: Talk, player: Player) -> None:
    """The live line. Raises ClientError when the player has failed."""
    loop = asyncio.get_running_loop()
    phase, since_s = "", 0.0
    while True:
        check(player)
        if talk.phase != phase:
            phase, since_s = talk.phase, loop.time()
        if not talk.prompting:
            talk.screen.status(phase, bar(talk.level), loop.time() - since_s)
        await asyncio.sleep(DRAW_S)


def check(player: Player) -> None:
    if player.failure:
        raise ClientError(f"the replies cannot be heard any more: {player.failure}")


def bar(level: float) -> float:
    """Loudness as ears have it: in decibels, 0 for FLOOR_DB below full scale, 1 for full scale."""
    return max(0.0, 1 + 20 * math.log10(level) / FLOOR_DB) if level > 0 else 0.0


@contextmanager
def stopped_by_signals(interrupt: Callable[[], bool]) -> Iterator[asyncio.Event]:
    """Ctrl-C interrupts what is being said; with nothing to interrupt, and SIGTERM at once, the
    event is set. Windows knows no such handlers: there Ctrl-C ends the program."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def on_interrupt() -> None:
        if not interrupt():
            stopped.set()

    with suppress(NotImplementedError):
        loop.add_signal_handler(signal.SIGINT, on_interrupt)
        loop.add_signal_handler(signal.SIGTERM, stopped.set)
    try:
        yield stopped
    finally:
        with suppress(NotImplementedError):
            loop.remove_signal_handler(signal.SIGINT)
            loop.remove_signal_handler(signal.SIGTERM)
