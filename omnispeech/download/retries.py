"""One failure is not the end: growing pauses, and a limit for a hub that gives nothing more."""

import logging
import threading
from dataclasses import dataclass

from omnispeech.download.hub import Hub, reason, retry_after_s
from omnispeech.download.models import Model
from omnispeech.errors import Unavailable

logger = logging.getLogger(__name__)

LONGEST_WISH_S = 600.0  # a hub that asks for more is not waited for


class Stopped(Exception):
    """The fetch was given up elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    failures: int = 10  # in a row, without a new byte in between: about five minutes
    first_s: float = 1.0
    longest_s: float = 60.0

    def pause_s(self, failures: int) -> float:
        return min(self.longest_s, self.first_s * 2.0 ** (failures - 1))


class Retries:
    """Counts the failures of one request that is repeated until it succeeds."""

    def __init__(self, hub: Hub, model: Model, patience: Patience, stop: threading.Event) -> None:
        self._hub, self._model = hub, model
        self._patience, self._stop = patience, stop
        self._failures = self._furthest = 0

    def reached(self, size: int) -> None:
        """size: bytes that are here. Those that were here before are no progress."""
        if size > self._furthest:
            self._furthest, self._failures = size, 0

    def failed(self, error: Exception, what: str) -> None:
        """Waits; raises what `error` means if it does not pass, or came too often."""
        self._failures += 1
        if not self._hub.passes(error):
            raise self._hub.refusal(error, self._model) from error
        if self._failures >= self._patience.failures:
            raise Unavailable(
                f"{self._hub.refusal(error, self._model)}; {self._failures} attempts in a row "
                "failed; what was fetched is kept: start again when the hub can be reached"
            ) from error
        pause = max(self._patience.pause_s(self._failures), retry_after_s(error))
        if pause > max(LONGEST_WISH_S, self._patience.longest_s):
            raise Unavailable(
                f"{self._hub.endpoint} asks to wait {pause:.0f} s; what was fetched is kept: "
                "start again then"
            ) from error
        logger.warning("%s: %s; trying again in %.1f s", what, reason(error), pause)
        if self._stop.wait(pause):
            raise Stopped
