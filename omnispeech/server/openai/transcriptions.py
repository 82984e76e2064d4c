"""POST /v1/audio/transcriptions: a sound file in, its words out, if the server is set to."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.datastructures import FormData, UploadFile

from omnispeech.audio.io import decode_audio
from omnispeech.config import ServerConfig, TalkConfig
from omnispeech.engine.events import Done, SpeechEngine, TextDelta
from omnispeech.errors import AudioError, Unsupported
from omnispeech.server.openai import sse
from omnispeech.server.openai.fields import field_refusal, without_neutral
from omnispeech.server.openai.models import check_model
from omnispeech.server.openai.refusals import OpenAIRoute, Refused
from omnispeech.server.openai.usage import token_usage
from omnispeech.server.reply import Reply, ReplyResponse, begin, while_caller_stays
from omnispeech.server.transcription import check_whole, transcription_turn

OFF = (
    "this server does not transcribe: the model was trained to answer, not to write down; start "
    "the server with --transcription model to let it try"
)
NO_TRANSLATION = "this model does not translate sound; ask it to in /v1/chat/completions"
MAX_FIELDS = 64
# All fields of a form are text.
NEUTRAL: dict[str, tuple[str, ...]] = {
    "temperature": ("0", "0.0"),
    "language": (),
    "languages[]": (),
    "prompt": ("",),
    "keywords[]": (),
    "chunking_strategy": (),
    "include[]": (),
    "timestamp_granularities[]": (),
    "known_speaker_names[]": (),
    "known_speaker_references[]": (),
}


class TranscriptionForm(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    response_format: Literal["json", "text"] = "json"
    stream: bool = False


def transcription_routes(engine: SpeechEngine, config: ServerConfig, talk: TalkConfig) -> APIRouter:
    router = APIRouter(route_class=OpenAIRoute)

    @router.post("/v1/audio/transcriptions")
    async def transcriptions(request: Request) -> Response:
        if talk.transcription == "off":
            raise Unsupported(OFF)
        async with request.form(max_files=1, max_fields=MAX_FIELDS) as form:
            wanted = parse_form(form, config)
            data = await uploaded(form)
        samples = await asyncio.to_thread(decoded, data, config.max_audio_s)
        reply = await begin(request, engine.answer(transcription_turn(samples)))
        if wanted.stream:
            return ReplyResponse(sse.with_error_told(events(reply)), reply, sse.MEDIA_TYPE)
        done = await while_caller_stays(request, whole(reply))
        if wanted.response_format == "text":
            return PlainTextResponse(reply.text.strip() + "\n")
        return JSONResponse({"text": reply.text.strip(), "usage": token_usage(done)})

    @router.post("/v1/audio/translations")
    async def translations() -> Response:
        raise Unsupported(NO_TRANSLATION)

    return router


def parse_form(form: FormData, config: ServerConfig) -> TranscriptionForm:
    fields: dict[str, Any] = {name: value for name, value in form.items() if name != "file"}
    try:
        wanted = TranscriptionForm.model_validate(without_neutral(fields, NEUTRAL, ()))
    except ValidationError as exc:
        raise field_refusal(exc) from exc
    check_model(wanted.model, config)
    return wanted


async def uploaded(form: FormData) -> bytes:
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise Refused("file is missing; send a sound file as multipart/form-data", param="file")
    return await file.read()


def decoded(data: bytes, max_seconds: float) -> Any:
    try:
        return decode_audio(data, max_seconds=max_seconds)
    except AudioError as exc:
        raise Refused(str(exc), param="file", code="invalid_audio") from exc


async def whole(reply: Reply) -> Done:
    """Reads it to its end; its text is then in the reply."""
    try:
        async for event in reply:
            if isinstance(event, Done):
                check_whole(event)
                return event
    finally:
        await reply.aclose()
    raise AssertionError("a reply without an end raises")


async def events(reply: Reply) -> AsyncIterator[bytes]:
    async for event in reply:
        if isinstance(event, TextDelta):
            yield sse.data({"type": "transcript.text.delta", "delta": event.text})
        elif isinstance(event, Done):
            check_whole(event)
            text, usage = reply.text.strip(), token_usage(event)
            yield sse.data({"type": "transcript.text.done", "text": text, "usage": usage})
