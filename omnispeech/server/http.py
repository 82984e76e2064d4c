"""uvicorn on a socket of ours, ended by a signal or by us, with an exit status of our own."""

import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from omnispeech.config import ServerConfig
from omnispeech.errors import ConfigError

GRACE_S = 30  # replies under way may finish this long after a stop signal


def listen(config: ServerConfig) -> socket.socket:
    """A port in use is found here, before anything slow is done for it."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except (OSError, UnicodeError) as exc:  # UnicodeError: no name that a host can have
        reason = getattr(exc, "strerror", None) or exc
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {reason}; "
            "choose another --port or --host"
        ) from exc


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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets:  # uvicorn tells the address only of sockets it opened itself
            self._log_started_message(sockets)

    def stop(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The second signal ends at once. uvicorn would raise the signal again at the end, and
        what comes after `run` would never happen."""
        self.force_exit = self.should_exit
        self.should_exit = True
