"""The original worker's protocol: JSON objects, each followed by one NUL byte."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from omnispeech.audio.io import encode_wav
from omnispeech.config import ServerConfig
from omnispeech.engine.events import AudioDelta, Done
from omnispeech.errors import OmniSpeechError, Unavailable
from omnispeech.server.admission import Admission
from omnispeech.server.protocol import parse_worker_request
from omnispeech.server.refusal import retry_after
from omnispeech.server.reply import STREAM_HEADERS, Reply, ReplyResponse, begin

MEDIA_TYPE = "application/octet-stream"
# Clients of the original look for this text; what went wrong is in "reason".
ERROR_TEXT = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    model_names: list[str]  # empty: a controller gives this worker no requests
    queue_length: int
    speed: int = 1


def worker_status(engine: Admission, config: ServerConfig) -> WorkerStatus:
    """Those who talk and those who wait; no model while none can be served."""
    status = engine.status()
    names = [config.model_name] if engine.ready else []
    return WorkerStatus(model_names=names, queue_length=status.running + status.waiting)


def worker_routes(engine: Admission, config: ServerConfig) -> APIRouter:
    router = APIRouter()

    @router.post("/worker_generate_stream")
    async def generate_stream(request: Request) -> Response:
        body = await request.body()
        try:
            turn = await asyncio.to_thread(parse_worker_request, body, config)
            reply = await begin(request, engine.answer(turn))
        except OmniSpeechError as exc:
            return refused(exc)
        return ReplyResponse(objects(reply, engine.sample_rate_hz), reply, MEDIA_TYPE)

    @router.post("/worker_get_status")
    async def get_status() -> WorkerStatus:
        return worker_status(engine, config)

    return router


async def objects(reply: Reply, rate_hz: int) -> AsyncIterator[bytes]:
    """One object per event, at once. The text is the whole text so far."""
    try:
        async for event in reply:
            audio = encode_wav(event.pcm, rate_hz) if isinstance(event, AudioDelta) else b""
            yield packed(
                text=reply.text,
                audio=base64.b64encode(audio).decode(),
                finalize=isinstance(event, Done),
                error_code=0,
            )
    except OmniSpeechError as exc:
        yield error_object(exc)


def refused(exc: OmniSpeechError) -> Response:
    """Clients of this protocol expect 200 and an error object; only "try again later" is 503."""
    status = exc.status if isinstance(exc, Unavailable) else 200
    headers = STREAM_HEADERS | retry_after(exc)
    return Response(error_object(exc), status, headers, MEDIA_TYPE)


def error_object(exc: OmniSpeechError) -> bytes:
    return packed(text=ERROR_TEXT, audio="", finalize=True, error_code=1, reason=str(exc))


def packed(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\0"
