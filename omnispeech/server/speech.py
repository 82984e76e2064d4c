"""POST /v1/speech: a sound file in, the spoken reply out; its text by GET /v1/speech/{turn_id}."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request, Response
from pydantic import BaseModel, FiniteFloat, model_validator

from omnispeech.audio.io import decode_audio, wav_stream_header
from omnispeech.config import ServerConfig
from omnispeech.engine.events import AudioDelta, Done, Event, SpeechEngine, TextDelta, TurnRequest
from omnispeech.errors import OmniSpeechError, RequestError
from omnispeech.server.protocol import check_length, spoken_turn
from omnispeech.server.refusal import error_body
from omnispeech.server.reply import Reply, ReplyResponse, begin, summary


class SpeechQuery(BaseModel):
    """The query parameters; a misspelt one is refused."""

    format: Literal["wav", "pcm", "events"] = "wav"
    system: str | None = None
    max_new_tokens: int = 256
    temperature: FiniteFloat = 1.0
    top_p: FiniteFloat = 1.0
    speech_temperature: FiniteFloat = 1.0
    seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown(cls, given: dict[str, Any]) -> dict[str, Any]:
        known = cls.model_fields
        if unknown := sorted(given.keys() - known.keys()):
            raise RequestError(f"unknown parameter {unknown[0]!r}; known: {', '.join(known)}")
        return given


class Turns:
    """Replies whose text can be asked for: all that run, and the last `keep` that ended."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._replies: dict[str, Reply] = {}

    def add(self, reply: Reply) -> None:
        self._replies[reply.id] = reply
        ended = [r.id for r in self._replies.values() if r.status != "running"]
        for turn_id in ended[: max(0, len(ended) - self._keep)]:
            del self._replies[turn_id]

    def get(self, turn_id: str) -> Reply:
        if turn_id not in self._replies:
            raise HTTPException(404, f"no such turn; the last {self._keep} are kept")
        return self._replies[turn_id]


def speech_routes(engine: SpeechEngine, config: ServerConfig) -> APIRouter:
    router = APIRouter()
    turns = Turns(config.keep_texts)

    @router.post("/v1/speech")
    async def speech(request: Request, query: Annotated[SpeechQuery, Query()]) -> Response:
        body = await request.body()
        turn = await asyncio.to_thread(question, body, query, config)
        reply = await begin(request, engine.answer(turn))
        turns.add(reply)
        return respond(reply, query.format, engine.sample_rate_hz)

    @router.get("/v1/speech/{turn_id}")
    async def text(turn_id: str) -> dict[str, Any]:
        return described(turns.get(turn_id))

    return router


def question(body: bytes, query: SpeechQuery, config: ServerConfig) -> TurnRequest:
    check_length(len(query.system or ""), config.max_text_chars)
    samples = decode_audio(body, max_seconds=config.max_audio_s)
    return spoken_turn(samples, **query.model_dump(exclude={"format"}))


def described(reply: Reply) -> dict[str, Any]:
    told = summary(reply.done) if reply.done else {}
    failed = {"failure": reply.failure} if reply.failure else {}
    return {"turn_id": reply.id, "status": reply.status, "text": reply.text, **told, **failed}


def respond(reply: Reply, form: str, rate_hz: int) -> Response:
    headers = {"X-Turn-Id": reply.id}
    if form == "events":
        return ReplyResponse(server_sent(reply, rate_hz), reply, "text/event-stream", headers)
    if form == "pcm":
        media_type = f"audio/pcm;rate={rate_hz};channels=1"
        return ReplyResponse(pcm(reply), reply, media_type, headers)
    return ReplyResponse(wav(reply, rate_hz), reply, "audio/wav", headers)


async def pcm(reply: Reply) -> AsyncIterator[bytes]:
    """An error breaks the connection: sound that is not the reply is never sent."""
    async for event in reply:
        if isinstance(event, AudioDelta):
            yield event.pcm


async def wav(reply: Reply, rate_hz: int) -> AsyncIterator[bytes]:
    yield wav_stream_header(rate_hz)
    async for piece in pcm(reply):
        yield piece


async def server_sent(reply: Reply, rate_hz: int) -> AsyncIterator[bytes]:
    try:
        async for event in reply:
            name, data = told(event, reply.id, rate_hz)
            yield packed(name, data)
    except OmniSpeechError as exc:
        yield packed("error", error_body(exc)["error"])


def told(event: Event, turn_id: str, rate_hz: int) -> tuple[str, dict[str, Any]]:
    match event:
        case TextDelta(text):
            return "text", {"text": text}
        case AudioDelta(pcm16):
            return "audio", {"audio": base64.b64encode(pcm16).decode(), "rate_hz": rate_hz}
        case Done():
            return "done", {"turn_id": turn_id, **summary(event)}
        case _:
            raise AssertionError(event)  # no tools were given


def packed(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
