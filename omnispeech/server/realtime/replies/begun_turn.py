"""A turn of the engine that runs whether or not somebody is listening yet."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass

from omnispeech.engine.events import Event
from omnispeech.server.admission import Guess

Queued = Event | Exception | None  # None: there is no more


class BegunTurn:
    """Its events wait until they are asked for. Closing it frees its place on the device."""

    def __init__(
        self, events: AsyncGenerator[Event, None], place: AbstractAsyncContextManager[object]
    ) -> None:
        """place: held while the engine works."""
        self._waiting: asyncio.Queue[Queued] = asyncio.Queue()
        self._first: Queued = None
        self._task = asyncio.create_task(self._run(events, place))

    async def _run(
        self, events: AsyncGenerator[Event, None], place: AbstractAsyncContextManager[object]
    ) -> None:
        try:
            async with place, aclosing(events):
                async for event in events:
                    self._put(event)
        except Exception as exc:
            self._put(exc)
        finally:
            self._put(None)

    def _put(self, queued: Queued) -> None:
        self._first = self._first or queued
        self._waiting.put_nowait(queued)

    @property
    def refused(self) -> bool:
        """It failed before it made anything."""
        return isinstance(self._first, Exception)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (queued := await self._waiting.get()) is not None:
            if isinstance(queued, Exception):
                raise queued
            yield queued

    def cancel(self) -> None:
        """Nothing more is made; who is listening hears the end."""
        self._task.cancel()
        while not self._waiting.empty():
            self._waiting.get_nowait()
        self._waiting.put_nowait(None)

    async def aclose(self) -> None:
        """Returns when the engine has let go."""
        self._task.cancel()
        await asyncio.wait([self._task])


@dataclass(slots=True)
class BegunGuess:
    """An answer to a question that may not be over; nobody has been told of it."""

    guess: Guess
    turn: BegunTurn
