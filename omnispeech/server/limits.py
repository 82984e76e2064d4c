"""What one request may cost."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omnispeech.errors import TooLarge
from omnispeech.server.refusal import refusal


class BodyLimit:
    """Refuses bodies over the limit: by their declared length, else while they are read."""

    def __init__(self, app: ASGIApp, max_mb: int) -> None:
        self._app = app
        self._max_bytes = max_mb * 1_000_000
        self._error = TooLarge(f"the body is over the limit of {max_mb} MB; send less at a time")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await refusal(self._error)(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_bytes:
                raise self._error
            return message

        return counted
