"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from omnispeech.errors import (
    AudioError,
    Forbidden,
    NotReady,
    OmniSpeechError,
    Overloaded,
    PromptTooLong,
    RequestError,
    RequestTimeout,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    Unsupported,
)
from omnispeech.server.refusal import retry_after

SERVER, REQUEST = "server_error", "invalid_request_error"

# the first class that fits, from the error's own upwards -> (type, code)
KINDS: dict[type[Exception], tuple[str, str | None]] = {
    PromptTooLong: (REQUEST, "context_length_exceeded"),
    AudioError: (REQUEST, "invalid_audio"),
    TooLarge: (REQUEST, "request_too_large"),
    RequestTimeout: (REQUEST, "request_timeout"),
    Unauthorized: (REQUEST, "invalid_api_key"),
    Forbidden: (REQUEST, "forbidden_origin"),
    Unsupported: (REQUEST, "unsupported"),
    RequestError: (REQUEST, "invalid_value"),
    TooManyRequests: ("rate_limit_error", "rate_limit_exceeded"),
    NotReady: (SERVER, "not_ready"),
    Overloaded: (SERVER, "overloaded"),
    Unavailable: (SERVER, "unavailable"),
    OmniSpeechError: (SERVER, None),
}


class Refused(RequestError):
    """Says which field of the request it is about, and why in one word."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_value",
        status: int = 400,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class OpenAIRoute(APIRoute):
    """Answers what goes wrong in the shape of OpenAI."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await handler(request)
            except OmniSpeechError as exc:
                return refusal(exc)
            except HTTPException as exc:  # the parser of forms
                return refusal(Refused(exc.detail, status=exc.status_code))

        return answered


def error_object(exc: OmniSpeechError) -> dict[str, str | None]:
    kind, code = next(KINDS[c] for c in type(exc).__mro__ if c in KINDS)
    param = None
    if isinstance(exc, Refused):
        param, code = exc.param, exc.code
    return {"message": str(exc), "type": kind, "param": param, "code": code}


def refusal(exc: OmniSpeechError) -> JSONResponse:
    headers = retry_after(exc)
    if isinstance(exc, Unsupported):  # the SDK would try twice again
        headers["x-should-retry"] = "false"
    return JSONResponse({"error": error_object(exc)}, exc.status, headers)


def speaks_openai(path: str) -> bool:
    """Whether OpenAI's clients ask there, for whoever refuses a request before its route."""
    return path.startswith(("/v1/chat/", "/v1/audio/", "/v1/models"))
