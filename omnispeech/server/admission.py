"""The engine as the routes see it: who is let in, how each turn ended, and the end of them all."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Literal

from omnispeech.engine.events import Done, EngineStatus, Event, SpeechEngine, TurnRequest
from omnispeech.errors import NotReady, RequestError, Stopped, Unavailable
from omnispeech.server.reply_record import Outcome, ReplyRecord

STOPPING = "the server is stopping; try again later, or elsewhere"
CUT = "the server stops, and had no time left for the rest of this reply; ask again, or elsewhere"

Farewell = Callable[[], Awaitable[None]]
Fate = Literal["used", "thrown_away"]  # of a guess


class Guess:
    """An answer begun before it is known that its question is whole.

    One of `commit` and `throw_away` is called, once; thrown away it counts as no reply.
    """

    def __init__(
        self, events: AsyncGenerator[Event, None], decided: Callable[[Fate], None]
    ) -> None:
        self.events = events
        self.used = False
        self._decided = decided

    def commit(self) -> None:
        """The question was whole: the caller waits from now on. The reply may have ended."""
        self.used = True
        self._decided("used")

    def throw_away(self) -> None:
        """The caller goes on speaking. `events` are closed by whoever iterates over them."""
        self._decided("thrown_away")


class Admission:
    """Implements SpeechEngine, for the event loop of one server.

    on_end: called once per reply that has ended. on_guess: once per guess.
    """

    def __init__(
        self,
        engine: SpeechEngine,
        on_end: Callable[[ReplyRecord], None],
        on_guess: Callable[[Fate], None] = lambda fate: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._on_end = on_end
        self._on_guess = on_guess
        self._clock = clock
        self._farewells: list[Farewell] = []
        self._waits: set[asyncio.Timeout] = set()  # of open turns, for their next event
        self._cut = False
        self.stopping = False
        self.open = 0  # turns begun and not yet ended

    @property
    def ready(self) -> bool:
        return self._engine.status().ready and not self.stopping

    @property
    def sample_rate_hz(self) -> int:
        return self._engine.sample_rate_hz

    def status(self) -> EngineStatus:
        return self._engine.status()

    def answer(self, request: TurnRequest) -> AsyncGenerator[Event, None]:
        now_s = self._clock()
        return self._run(ReplyRecord(request=request, begun_s=now_s, asked_s=now_s))

    def guess(self, request: TurnRequest) -> Guess:
        record = ReplyRecord(request=request, begun_s=self._clock(), asked_s=None)

        def decided(fate: Fate) -> None:
            self._on_guess(fate)
            if fate == "used":
                record.asked_s = self._clock()
                self._settle(record)

        return Guess(self._run(record), decided)

    async def _run(self, record: ReplyRecord) -> AsyncGenerator[Event, None]:
        outcome: Outcome = "cancelled"
        self.open += 1
        try:
            if self.stopping:
                raise NotReady(STOPPING)
            with record.caller.reply():
                record.caller.check()  # what finds no place is no request
                async with aclosing(self._engine.answer(record.request)) as events:
                    while event := await self._next(events):
                        record.note(event, self.sample_rate_hz, self._clock())
                        if isinstance(event, Done):
                            outcome = finish(event)
                        yield event
        except Exception as exc:
            outcome = failure(exc)
            raise
        finally:
            self.open -= 1
            record.end(outcome, self._clock())
            self._settle(record)

    async def _next(self, events: AsyncGenerator[Event, None]) -> Event | None:
        """None: there is none left. Whoever waits here when `cut` is called waits no longer."""
        if self._cut:
            raise Stopped(CUT)
        wait = asyncio.timeout(None)
        self._waits.add(wait)
        try:
            async with wait:
                return await anext(events, None)
        except TimeoutError:
            if not wait.expired():
                raise
            raise Stopped(CUT) from None
        finally:
            self._waits.discard(wait)

    def _settle(self, record: ReplyRecord) -> None:
        """Once the reply has ended and is known to be one."""
        if record.outcome and record.asked_s is not None:
            if record.outcome not in ("refused", "unavailable"):
                record.caller.charge(record.request.messages, record.audio_s)
            self._on_end(record)

    def on_stop(self, farewell: Farewell) -> None:
        """farewell: awaited once the server begins to stop, until all that it tells have gone."""
        self._farewells.append(farewell)

    def stop(self) -> None:
        """No turn begins any more; those under way go on."""
        self.stopping = True

    async def say_farewell(self) -> None:
        await asyncio.gather(*(farewell() for farewell in self._farewells))

    def cut(self) -> None:
        """Every turn that is still open raises Stopped to whoever iterates over it."""
        self._cut = True
        for wait in self._waits:
            wait.reschedule(asyncio.get_running_loop().time())


def finish(done: Done) -> Outcome:
    whole = done.text_finish == done.speech_finish == "stop"
    return "stop" if whole else "length"


def failure(exc: Exception) -> Outcome:
    if isinstance(exc, Stopped):
        return "cut"
    if isinstance(exc, Unavailable):
        return "unavailable"
    return "refused" if isinstance(exc, RequestError) else "failed"
