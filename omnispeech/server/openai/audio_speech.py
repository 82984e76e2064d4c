"""POST /v1/audio/speech: a text, spoken by the model's own speech LM."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from omnispeech.audio.encoders import FORMATS, RATE_HZ, Encoder
from omnispeech.config import ServerConfig
from omnispeech.engine.events import AudioDelta, Event, Message, SpeechEngine, Text, TurnRequest
from omnispeech.errors import RequestError
from omnispeech.server.openai import sse
from omnispeech.server.openai.fields import (
    checked_sampling,
    field_refusal,
    json_object,
    without_neutral,
)
from omnispeech.server.openai.models import check_model
from omnispeech.server.openai.refusals import OpenAIRoute, Refused
from omnispeech.server.openai.usage import token_usage
from omnispeech.server.protocol import Number, WholeNumber
from omnispeech.server.reply import Reply, ReplyResponse, begin
from omnispeech.server.voices import VOICE, voice_problem

MAX_CHARACTERS = 4096  # OpenAI's
TOO_LONG = "string_above_max_length"
NEUTRAL: dict[str, tuple[Any, ...]] = {"speed": (1.0,)}
# The speech LM speaks what the LLM has in mind: it is asked for the text that it is then given.
TASK = "Repeat the following text word for word and say nothing else:\n"


class SpeechBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    input: str
    model: str | None = None
    voice: Any = VOICE
    instructions: str | None = None
    response_format: Literal["mp3", "opus", "flac", "wav", "pcm"] = "mp3"
    stream_format: Literal["audio", "sse"] = "audio"
    speech_temperature: Number = 1.0  # this server's own, as seed
    seed: WholeNumber | None = None

    @property
    def form(self) -> str:
        """Of FORMATS."""
        return "pcm16" if self.response_format == "pcm" else self.response_format


def audio_speech_routes(engine: SpeechEngine, config: ServerConfig) -> APIRouter:
    router = APIRouter(route_class=OpenAIRoute)

    @router.post("/v1/audio/speech")
    async def speech(request: Request) -> Response:
        wanted = await asyncio.to_thread(parse_speech, await request.body(), config)
        reply = await begun(request, engine.answer(script_turn(wanted)))
        headers = {"X-Sample-Rate": str(RATE_HZ), "X-Request-Id": reply.id}
        sound = spoken(reply, Encoder(wanted.form, engine.sample_rate_hz))
        if wanted.stream_format == "sse":
            events = sse.with_error_told(sound_events(reply, sound))
            return ReplyResponse(events, reply, sse.MEDIA_TYPE, headers)
        return ReplyResponse(sound, reply, FORMATS[wanted.form].media_type, headers)

    return router


async def begun(request: Request, events: AsyncGenerator[Event, None]) -> Reply:
    try:
        return await begin(request, events)
    except RequestError as exc:
        if exc.status != 400:
            raise
        raise Refused(str(exc), param="input", code=TOO_LONG) from exc


def parse_speech(body: bytes, config: ServerConfig) -> SpeechBody:
    left = without_neutral(json_object(body), NEUTRAL, ())
    try:
        wanted = SpeechBody.model_validate(left)
    except ValidationError as exc:
        raise field_refusal(exc) from exc
    check_model(wanted.model, config)
    if problem := voice_problem(wanted.voice):
        raise Refused(problem, param="voice")
    _check_texts(wanted)
    return wanted


def _check_texts(wanted: SpeechBody) -> None:
    if not wanted.input.strip():
        raise Refused("input is empty; send the text to be spoken", param="input")
    for name, text in (("input", wanted.input), ("instructions", wanted.instructions or "")):
        if len(text) > MAX_CHARACTERS:
            raise Refused(
                f"{name} has {len(text)} characters; send at most {MAX_CHARACTERS} at a time",
                param=name,
                code=TOO_LONG,
            )


def script_turn(wanted: SpeechBody) -> TurnRequest:
    told = (Message("system", (Text(wanted.instructions),)),) if wanted.instructions else ()
    task = Message("user", (Text(TASK + wanted.input),))
    return TurnRequest(
        messages=(*told, task),
        script=wanted.input,
        **checked_sampling(wanted),
    )


async def spoken(reply: Reply, encoder: Encoder) -> AsyncIterator[bytes]:
    """An error breaks the connection: sound that is not the text is never sent."""
    async for event in reply:
        if isinstance(event, AudioDelta) and (
            sound := await asyncio.to_thread(encoder.push, event.pcm)
        ):
            yield sound
    yield await asyncio.to_thread(encoder.finish)


async def sound_events(reply: Reply, sound: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    pieces = sse.Base64Pieces()
    async for new in sound:
        for piece in pieces.push(new):
            yield sse.data({"type": "speech.audio.delta", "audio": piece})
    for piece in pieces.finish():
        yield sse.data({"type": "speech.audio.delta", "audio": piece})
    assert reply.done is not None  # a reply without an end raises
    yield sse.data({"type": "speech.audio.done", "usage": token_usage(reply.done)})
