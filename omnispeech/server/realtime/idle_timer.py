"""Silence after a reply, after which the model speaks by itself."""

import asyncio
from collections.abc import Awaitable, Callable


class IdleTimer:
    """Calls `speak` at the time that was set last."""

    def __init__(self, speak: Callable[[], Awaitable[None]]) -> None:
        self._speak = speak
        self._task: asyncio.Task[None] | None = None

    def at(self, time_s: float) -> None:
        """On the event loop's clock."""
        self.cancel()
        self._task = asyncio.create_task(self._run(time_s))

    async def _run(self, time_s: float) -> None:
        await asyncio.sleep(time_s - asyncio.get_running_loop().time())
        await self._speak()

    def cancel(self) -> None:
        if self._task:
            self._task.cancel()
            self._task = None
