"""Errors as HTTP answers: {"error": {"type", "message"}}."""

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from omnispeech.errors import OmniSpeechError, RequestError, Unavailable

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it is for the access log
SHOWN_CHARACTERS = 40


def error_body(exc: OmniSpeechError) -> dict[str, dict[str, str]]:
    return {"error": {"type": type(exc).__name__, "message": str(exc)}}


def retry_after(exc: OmniSpeechError) -> dict[str, str]:
    return {"Retry-After": str(exc.retry_after_s)} if isinstance(exc, Unavailable) else {}


def refusal(exc: OmniSpeechError) -> JSONResponse:
    return JSONResponse(error_body(exc), exc.status, retry_after(exc))


def field_error(errors: Sequence[Mapping[str, Any]]) -> RequestError:
    """The first of pydantic's complaints, in the words of this house."""
    first = errors[0]
    if first["type"] == "json_invalid" and not first["input"].strip():
        return RequestError("the body is empty; send JSON")
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first['ctx']['error']}")
    place = "the body"
    for step in first["loc"]:
        place = _place(place, step)
    if first["type"] == "missing":
        return RequestError(f"{place} is missing; send it")
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "model_type":
        message = "input should be an object"  # pydantic names a class of ours
    return RequestError(f"{place}={shown(first['input'])}: {message}")


def _place(place: str, step: str | int) -> str:
    if isinstance(step, int):
        return f"{place}[{step}]"
    return step if place in ("the body", "query", "path") else f"{place}.{step}"


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(OmniSpeechError)
    async def refused(request: Request, exc: OmniSpeechError) -> Response:
        return refusal(exc)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, exc: RequestValidationError) -> Response:
        return refusal(field_error(exc.errors()))

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, exc: HTTPException) -> Response:
        phrase = HTTPStatus(exc.status_code).phrase
        detail = phrase.lower() if exc.detail == phrase else exc.detail
        message = f"{request.method} {request.url.path}: {detail}"
        body = {"error": {"type": phrase.replace(" ", ""), "message": message}}
        return JSONResponse(body, exc.status_code, exc.headers)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, exc: ClientDisconnect) -> Response:
        logger.info("%s: the caller left before the answer", request.url.path)
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def failed(request: Request, exc: Exception) -> Response:
        message = "the server failed; its log has the reason"
        return JSONResponse({"error": {"type": "ServerError", "message": message}}, 500)
