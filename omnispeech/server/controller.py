"""Registers this worker with a controller of OpenS2S and keeps it registered.

All of it is one task beside the requests: a controller that is down, slow or mad costs that task
its time, and nobody else anything.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, replace

import httpx
from pydantic import BaseModel, StrictBool
from pydantic_core import from_json

from omnispeech.server.worker_api import WorkerStatus

logger = logging.getLogger(__name__)

BEAT_S = 15.0  # a controller forgets a worker that was silent for 30 s
LOOK_S = 1.0  # a change of the queue is told at once, but not more often than this
TIMEOUT_S = 5.0  # of one call of the controller
LEAVE_S = 2.0  # a stop does not wait for the controller any longer
FIRST_RETRY_S = 1.0
LONGEST_ANSWER = 65_536  # bytes; a controller's has a few
TROUBLE = (httpx.HTTPError, TimeoutError, ValueError)  # ValueError: an answer of another form


class BeatAnswer(BaseModel):
    exist: StrictBool  # false: the controller does not know this worker


class Registration:
    """One worker at one controller.

    worker: the URL that the controller gives its requests to. status: asked before each message;
    one without models is not registered. transport, sleep: for tests.
    """

    def __init__(
        self,
        controller: str,
        worker: str,
        status: Callable[[], WorkerStatus],
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._controller = controller.rstrip("/")
        self._worker = worker.rstrip("/")
        self._status = status
        self._sleep = sleep
        self._client = httpx.AsyncClient(transport=transport or straight(), timeout=TIMEOUT_S)
        self._offered = False  # the controller may know this worker, even if the call was cut
        self._registered = False
        self._failures = 0
        self._told_length = 0

    async def run(self) -> None:
        """Until it is cancelled."""
        while not self._status().model_names:
            await self._sleep(LOOK_S)
        while True:
            try:
                await self._beat()
            except TROUBLE as exc:
                self._failed(exc)
                await self._sleep(retry_pause_s(self._failures, random.random()))
            else:
                self._succeeded()
                await self._until_due()

    async def leave(self) -> None:
        """The last call. The protocol has no word for it: a worker without models is given no
        requests, and is forgotten once it is silent."""
        if self._offered:
            with suppress(*TROUBLE):
                async with asyncio.timeout(LEAVE_S):
                    await self._register(replace(self._status(), model_names=[]))
        await self._client.aclose()

    async def _beat(self) -> None:
        status = self._status()
        if self._registered:
            self._registered = await self._is_known(status.queue_length)
        if not self._registered:
            self._offered = True
            await self._register(status)
            self._registered = True
            logger.info("registered with the controller %s as %s", self._controller, self._worker)
        self._told_length = status.queue_length

    async def _is_known(self, queue_length: int) -> bool:
        answer = await self._post(
            "/receive_heart_beat", worker_name=self._worker, queue_length=queue_length
        )
        return BeatAnswer.model_validate_json(answer).exist

    async def _register(self, status: WorkerStatus) -> None:
        answer = await self._post(
            "/register_worker",
            worker_name=self._worker,
            check_heart_beat=True,
            worker_status=asdict(status),
        )
        from_json(answer)  # null; a page of something else that listens there is none

    async def _post(self, path: str, **body: object) -> bytes:
        call = self._client.stream("POST", self._controller + path, json=body)
        answer = b""
        async with asyncio.timeout(TIMEOUT_S), call as response:
            response.raise_for_status()
            async for part in response.aiter_bytes():
                answer += part
                if len(answer) > LONGEST_ANSWER:
                    raise ValueError(f"more than {LONGEST_ANSWER} bytes")
        return answer

    async def _until_due(self) -> None:
        for _ in range(int(BEAT_S / LOOK_S)):
            await self._sleep(LOOK_S)
            if self._status().queue_length != self._told_length:
                return

    def _failed(self, exc: Exception) -> None:
        """One line, however long it lasts."""
        self._failures += 1
        if self._failures == 1:
            logger.warning(
                "the controller %s: %s; requests that come here are served, and it is tried "
                "again until it answers",
                self._controller,
                reason(exc),
            )

    def _succeeded(self) -> None:
        if self._failures:
            logger.info(
                "the controller %s answers again after %d failed calls",
                self._controller,
                self._failures,
            )
        self._failures = 0


def straight() -> httpx.AsyncHTTPTransport:
    """Not through a proxy of the environment, which is for the internet; and each time anew: a
    controller may have closed a connection that was kept."""
    return httpx.AsyncHTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))


def retry_pause_s(failures: int, draw: float) -> float:
    """Doubles from 1 s up to the pause between heartbeats; draw, in [0, 1), takes off up to half,
    so that many workers do not come back to a controller at the same moment."""
    longest = min(BEAT_S, FIRST_RETRY_S * 2.0 ** min(failures - 1, 10))
    return longest * (1.0 - draw / 2.0)


def reason(exc: Exception) -> str:
    if isinstance(exc, httpx.HTTPStatusError):
        return f"its answer has status {exc.response.status_code}"
    if isinstance(exc, TimeoutError | httpx.TimeoutException):
        return f"no answer within {TIMEOUT_S:g} s"
    if isinstance(exc, UnicodeError):
        return "no host can have such a name"
    if isinstance(exc, ValueError):
        return "its answer is not that of a controller"
    return str(exc) or type(exc).__name__
