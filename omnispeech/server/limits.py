"""What one request may cost: bytes of its body, and the time that they take to arrive."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omnispeech.errors import RequestError, RequestTimeout, TooLarge
from omnispeech.server.refusal_by_path import answer


class BodyLimit:
    """Refuses bodies over the limit by their declared length, else while they are read, and those
    that are not whole `upload_s` after the first of them was waited for."""

    def __init__(self, app: ASGIApp, max_mb: int, upload_s: float) -> None:
        self._app = app
        self._max_mb = max_mb
        self._upload_s = upload_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = Body(receive, send, self._max_mb, self._upload_s)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > body.max_bytes:
            await answer(body.too_large(), scope["path"])(scope, receive, send)
            return
        await self._app(scope, body.receive, body.send)
        if body.refused and not body.answered:
            await answer(body.refused, scope["path"])(scope, receive, send)


class Body:
    """One request on its way in, and the answer on its way out."""

    def __init__(self, receive: Receive, send: Send, max_mb: int, upload_s: float) -> None:
        self._receive, self._send = receive, send
        self._max_mb, self._upload_s = max_mb, upload_s
        self._taken = 0
        self._deadline_s: float | None = None
        self._whole = False
        self.refused: RequestError | None = None
        self.answered = False

    @property
    def max_bytes(self) -> int:
        return self._max_mb * 1_000_000

    def too_large(self) -> TooLarge:
        return TooLarge(f"the body is over the limit of {self._max_mb} MB; send less at a time")

    def _too_slow(self) -> RequestTimeout:
        return RequestTimeout(
            f"the body was not whole after {self._upload_s:g} s; send less at a time, or faster"
        )

    async def receive(self) -> Message:
        if self._whole:  # what comes now is that the caller has left
            return await self._receive()
        now_s = asyncio.get_running_loop().time()
        self._deadline_s = self._deadline_s or now_s + self._upload_s
        try:
            async with asyncio.timeout_at(self._deadline_s):
                message = await self._receive()
        except TimeoutError:
            raise self._refuse(self._too_slow()) from None
        self._taken += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._taken > self.max_bytes:
            raise self._refuse(self.too_large())
        return message

    def _refuse(self, error: RequestError) -> RequestError:
        self.refused = error
        return error

    async def send(self, message: Message) -> None:
        """An answer that had begun goes on; one that would name another reason is left out."""
        if self.refused and not self.answered:
            return
        self.answered = True
        await self._send(message)
