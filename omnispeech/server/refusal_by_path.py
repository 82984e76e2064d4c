"""Refusals in the shape that their path speaks: ours, OpenAI's, or a WebSocket that closes."""

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from omnispeech.errors import OmniSpeechError, Unauthorized, Unavailable
from omnispeech.server.openai.refusals import refusal as openai_refusal
from omnispeech.server.openai.refusals import speaks_openai
from omnispeech.server.refusal import refusal

POLICY, TRY_AGAIN_LATER = 1008, 1013  # registered close codes of WebSockets
REASON_BYTES = 123  # that a close frame has room for
REALTIME = "realtime"  # the subprotocol that browsers need to be chosen


async def refuse(exc: OmniSpeechError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await refuse_websocket(exc, scope, receive, send)
    else:
        await answer(exc, scope["path"])(scope, receive, send)


def answer(exc: OmniSpeechError, path: str) -> Response:
    response = openai_refusal(exc) if speaks_openai(path) else refusal(exc)
    if isinstance(exc, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


async def refuse_websocket(
    exc: OmniSpeechError, scope: Scope, receive: Receive, send: Send
) -> None:
    """Accepts first: a browser does not tell its page why a handshake failed."""
    await receive()  # websocket.connect
    chosen = REALTIME if REALTIME in scope.get("subprotocols", ()) else None
    await send({"type": "websocket.accept", "subprotocol": chosen})
    await send({"type": "websocket.close", "code": close_code(exc), "reason": close_reason(exc)})


def close_code(exc: OmniSpeechError) -> int:
    return TRY_AGAIN_LATER if isinstance(exc, Unavailable) else POLICY


def close_reason(exc: OmniSpeechError) -> str:
    return str(exc).encode()[:REASON_BYTES].decode(errors="ignore")
