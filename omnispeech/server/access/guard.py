"""Before every route: the page that asks, and the API key."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from omnispeech.errors import Forbidden, Unauthorized
from omnispeech.server.access.callers import CALLER, Caller
from omnispeech.server.access.keys import Keys
from omnispeech.server.access.origins import Origins
from omnispeech.server.access.quotas import Account
from omnispeech.server.access.refused import refuse

# probes, and what a controller asks without a key and /ready tells as well
OPEN_PATHS = {"/", "/health", "/ready", "/worker_get_status"}
OPEN_FOLDER = "/page/"
METRICS = "/metrics"
KEY_PROTOCOL = "openai-insecure-api-key."  # how a page sends a key: it cannot set headers
ANYBODY = Account("anybody")


class Guard:
    """ASGI middleware. Sets CALLER for what is let in; other requests reach no route."""

    def __init__(self, app: ASGIApp, keys: Keys, origins: Origins) -> None:
        self._app, self._keys, self._origins = app, keys, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            caller = self._caller(scope)
        except (Forbidden, Unauthorized) as exc:
            await refuse(exc, scope, receive, send)
            return
        token = CALLER.set(caller)
        try:
            await self._app(scope, receive, send)
        finally:
            CALLER.reset(token)

    def _caller(self, scope: Scope) -> Caller:
        headers, live = Headers(scope=scope), scope["type"] == "websocket"
        if self._is_open(scope["path"]):
            return Caller(ANYBODY, live)
        self._origins.check(headers)
        if not self._keys.needed:
            return Caller(ANYBODY, live)
        key = sent_key(headers, scope.get("subprotocols", ()))
        if key is None:
            raise Unauthorized("an API key is needed; send it as Authorization: Bearer KEY")
        if account := self._keys.find(key):
            return Caller(account, live)
        raise Unauthorized("the API key is not known here; ask who runs the server for one")

    def _is_open(self, path: str) -> bool:
        if path == METRICS:
            return self._keys.metrics_are_open
        return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def sent_key(headers: Headers, subprotocols: list[str] | tuple[str, ...]) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    for protocol in subprotocols:
        if protocol.startswith(KEY_PROTOCOL):
            return protocol.removeprefix(KEY_PROTOCOL)
    return None
