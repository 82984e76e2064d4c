"""What stands before every route: the page that asks, and the API key."""

import logging
import os
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers, QueryParams
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from omnispeech.config import AccessConfig
from omnispeech.errors import Forbidden, TooManyRequests, Unauthorized
from omnispeech.server.access.callers import ANYBODY, CALLER, Caller
from omnispeech.server.access.keys import VARIABLE, Keys
from omnispeech.server.access.origins import Origins
from omnispeech.server.refusal_by_path import refuse

logger = logging.getLogger(__name__)

# headers, by pages of other origins
READABLE = ["Retry-After", "X-Turn-Id", "X-Sample-Rate", "X-Request-Id"]
# probes, and what a controller asks without a key and /ready tells as well
OPEN_PATHS = {"/", "/health", "/ready", "/worker_get_status"}
OPEN_FOLDER = "/page/"
METRICS = "/metrics"
KEY_PROTOCOL = "openai-insecure-api-key."  # how a page sends a key: it cannot set headers


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
        except (Forbidden, Unauthorized, TooManyRequests) as exc:
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
            if asks_for_more(scope):
                account.peek()
            return Caller(account, live)
        raise Unauthorized("the API key is not known here; ask who runs the server for one")

    def _is_open(self, path: str) -> bool:
        if path == METRICS:
            return self._keys.metrics_are_open
        return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def asks_for_more(scope: Scope) -> bool:
    """What is over the limits of its key is told so before its body is read and decoded; whoever
    serves the request counts. A talk that lost its connection may always come back to its place."""
    if scope["type"] == "websocket":
        return "resume" not in QueryParams(scope["query_string"])
    return bool(scope["method"] == "POST")


def sent_key(headers: Headers, subprotocols: list[str] | tuple[str, ...]) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    for protocol in subprotocols:
        if protocol.startswith(KEY_PROTOCOL):
            return protocol.removeprefix(KEY_PROTOCOL)
    return None


def guard(
    app: Starlette, access: AccessConfig, host: str, environ: Mapping[str, str] = os.environ
) -> None:
    """Lets in who may come in. host: the address that is listened on.

    Raises ConfigError for keys that cannot be used.
    """
    keys = keys_of(access, environ)
    if not keys.needed and not is_loopback(host):
        logger.warning(
            "no API key is needed here: whoever reaches the address %s may use this server; "
            "docs/security.md tells how to set keys",
            host,
        )
    listed = access.listed_origins
    app.add_middleware(Guard, keys=keys, origins=Origins(listed, with_keys=keys.needed))
    if listed:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=listed,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=READABLE,
        )


def keys_of(access: AccessConfig, environ: Mapping[str, str] = os.environ) -> Keys:
    """Raises ConfigError for keys that cannot be used."""
    path = Path(access.api_keys).expanduser() if access.api_keys else None
    return Keys(path, environ.get(VARIABLE, ""))


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name
        return False
