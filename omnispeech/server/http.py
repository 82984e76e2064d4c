"""uvicorn on a socket of ours, ended by a signal or by us, with an exit status of our own."""

import asyncio
import logging
import socket
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from omnispeech.config import AccessConfig, ServerConfig, TalkConfig
from omnispeech.server.admission import Admission
from omnispeech.server.connections import Crowd, protocols
from omnispeech.server.controller import Registration
from omnispeech.server.uvicorn_log import shorten_log
from omnispeech.server.worker_api import worker_status

logger = logging.getLogger(__name__)

TICK_S = 0.05
CLOSE_S = 2  # what is no reply, or one over its time, may still be sent this long
DEFAULT_TALK, DEFAULT_ACCESS = TalkConfig(), AccessConfig()


class HTTPServer(uvicorn.Server):
    """app: of `create_app`. With a controller in the settings it is registered while it runs.

    What it logs goes to the handlers of the root logger.
    """

    def __init__(
        self,
        app: FastAPI,
        config: ServerConfig,
        talk: TalkConfig = DEFAULT_TALK,
        access: AccessConfig = DEFAULT_ACCESS,
    ) -> None:
        http, websocket = protocols(access.stalled_s)
        super().__init__(
            uvicorn.Config(
                Crowd(app, access.max_connections, app.state.watch),
                http=http,
                ws=websocket,
                host=config.host,
                port=config.port,
                log_config=None,
                log_level="info",
                timeout_graceful_shutdown=CLOSE_S,
                ws_max_size=talk.max_frame_mb * 1_000_000,
                ws_per_message_deflate=False,  # sound does not get smaller
                ssl_certfile=access.tls_certificate or None,
                ssl_keyfile=access.tls_key or None,
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
        """The door stays open while replies are under way: whoever comes then is told why not.

        Replies over their time are cut, and told so in their own protocol.
        """
        self._admission.stop()
        leaving = asyncio.create_task(self._leave())
        if not await self._quiet(leaving, self._drain_s):
            self._admission.cut()
            await self._quiet(leaving, CLOSE_S)
        if self.force_exit:
            self._admission.cut()
            await asyncio.sleep(TICK_S)  # for what is told to whoever still waits
        leaving.cancel()
        await super().shutdown(sockets)

    async def _leave(self) -> None:
        await asyncio.gather(self._unregister(), self._admission.say_farewell())

    async def _unregister(self) -> None:
        if self._registration and self._registering:
            self._registering.cancel()
            await asyncio.wait([self._registering])
            await self._registration.leave()

    async def _quiet(self, leaving: asyncio.Task[None], within_s: float) -> bool:
        """Whether no reply is under way any more, and all who had to be told have been."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + within_s
        if self._admission.open:
            logger.info(
                "stopping; replies under way: %d, for at most %g s", self._admission.open, within_s
            )
        while self._admission.open or not leaving.done():
            if self.force_exit or loop.time() >= end_s:
                return self.force_exit
            await asyncio.sleep(TICK_S)
        return True

    def stop(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The second signal ends at once. uvicorn would raise the signal again at the end, and
        what comes after `run` would never happen."""
        self.force_exit = self.should_exit
        self.should_exit = True
