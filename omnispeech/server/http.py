"""uvicorn on a socket of ours, ended by a signal or by us, with an exit status of our own."""

import asyncio
import logging
import socket
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from omnispeech.config import ServerConfig
from omnispeech.server.admission import Admission
from omnispeech.server.controller import Registration
from omnispeech.server.uvicorn_log import shorten_log
from omnispeech.server.worker_api import worker_status

logger = logging.getLogger(__name__)

TICK_S = 0.05
CLOSE_S = 2  # what is no reply, or one over its time, may still be sent this long


class HTTPServer(uvicorn.Server):
    """app: of `create_app`. With a controller in the settings it is registered while it runs."""

    def __init__(self, app: FastAPI, config: ServerConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                log_level="info",
                timeout_graceful_shutdown=CLOSE_S,
            )
        )
        shorten_log()
        self._drain_s = config.drain_s
        self._admission: Admission = app.state.admission
        status = partial(worker_status, self._admission, config)
        self._registration = (
            Registration(config.controller, config.address, status) if config.controller else None
        )
        self._registering: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets:  # uvicorn tells the address only of sockets it opened itself
            self._log_started_message(sockets)
        if self._registration:
            self._registering = asyncio.create_task(self._registration.run())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """The door stays open while replies are under way: whoever comes then is told why not."""
        self._admission.stop()
        leaving = asyncio.create_task(self._leave())
        await self._drain(leaving)
        leaving.cancel()
        await super().shutdown(sockets)

    async def _leave(self) -> None:
        if self._registration and self._registering:
            self._registering.cancel()
            await asyncio.wait([self._registering])
            await self._registration.leave()

    async def _drain(self, leaving: asyncio.Task[None]) -> None:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._drain_s
        if self._admission.open:
            logger.info(
                "stopping; replies under way: %d, for at most %g s",
                self._admission.open,
                self._drain_s,
            )
        while not leaving.done() or (self._admission.open and loop.time() < end_s):
            if self.force_exit:
                return
            await asyncio.sleep(TICK_S)

    def stop(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The second signal ends at once. uvicorn would raise the signal again at the end, and
        what comes after `run` would never happen."""
        self.force_exit = self.should_exit
        self.should_exit = True
