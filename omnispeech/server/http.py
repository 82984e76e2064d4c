"""uvicorn, ended by a signal or by us, with an exit status of our own."""

from types import FrameType

import uvicorn
from fastapi import FastAPI

from omnispeech.config import ServerConfig

GRACE_S = 30  # replies under way may finish this long after a stop signal


class HTTPServer(uvicorn.Server):
    def __init__(self, app: FastAPI, config: ServerConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                log_level="info",
                timeout_graceful_shutdown=GRACE_S,
            )
        )

    def stop(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The second signal ends at once. uvicorn would raise the signal again at the end, and
        what comes after `run` would never happen."""
        self.force_exit = self.should_exit
        self.should_exit = True
