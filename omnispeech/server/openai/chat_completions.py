"""POST /v1/chat/completions: text and sound in, text or speech out, whole or as it is made."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from omnispeech.audio.encoders import RATE_HZ, Encoder, encode
from omnispeech.config import ServerConfig, TalkConfig
from omnispeech.engine.events import AudioDelta, Done, SpeechEngine, TextDelta, ToolCall
from omnispeech.server.openai import sse
from omnispeech.server.openai.audio_memory import AudioMemory, Said, expiry
from omnispeech.server.openai.chat_request import Chat, parse_chat
from omnispeech.server.openai.refusals import OpenAIRoute
from omnispeech.server.openai.usage import completion_usage
from omnispeech.server.reply import Reply, ReplyResponse, begin, while_caller_stays


def chat_routes(engine: SpeechEngine, config: ServerConfig, talk: TalkConfig) -> APIRouter:
    router = APIRouter(route_class=OpenAIRoute)
    memory = AudioMemory(config.keep_texts)

    @router.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        body = await request.body()
        unable = engine.status().unsupported
        chat = await asyncio.to_thread(parse_chat, body, config, talk, memory, unable)
        reply = await begin(request, engine.answer(chat.turn))
        completion = Completion(chat, reply, config.model_name, engine.sample_rate_hz, memory)
        headers = {"X-Request-Id": reply.id}
        if chat.form:
            headers["X-Sample-Rate"] = str(RATE_HZ)
        if chat.stream:
            events = sse.with_error_told(completion.chunks())
            return ReplyResponse(events, reply, sse.MEDIA_TYPE, headers)
        whole = await while_caller_stays(request, completion.whole())
        return await asyncio.to_thread(JSONResponse, whole, headers=headers)  # megabytes of sound

    return router


@dataclass(slots=True)
class Completion:
    """One reply, told as OpenAI tells it."""

    chat: Chat
    reply: Reply
    model: str
    rate_hz: int
    memory: AudioMemory
    created: int = field(default_factory=lambda: int(time.time()))
    expires_at: int = field(default_factory=expiry)
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def audio_id(self) -> str:
        return f"audio_{self.reply.id}"

    async def whole(self) -> dict[str, Any]:
        pcm = bytearray()
        try:
            async for event in self.reply:
                if isinstance(event, AudioDelta):
                    pcm += event.pcm
                elif isinstance(event, ToolCall):
                    self._add_call(event)
        finally:
            await self.reply.aclose()
        choice = {
            "index": 0,
            "message": await self._message(bytes(pcm)),
            "logprobs": None,
            "finish_reason": self._finish(),
        }
        return self._object("chat.completion", [choice]) | {"usage": self._usage()}

    async def chunks(self) -> AsyncIterator[bytes]:
        role = {"role": "assistant"}
        deltas = self._spoken(self.chat.form) if self.chat.form else self._written()
        async for delta in deltas:
            yield self._chunk(role | delta)
            role = {}
        yield self._chunk(role, self._finish())
        if self.chat.include_usage:
            end = self._object("chat.completion.chunk", []) | {"usage": self._usage()}
            yield sse.data(end)
        yield sse.END

    async def _written(self) -> AsyncIterator[dict[str, Any]]:
        yield {"content": ""}
        async for event in self.reply:
            if isinstance(event, TextDelta):
                yield {"content": event.text}
            elif isinstance(event, ToolCall):
                yield {"tool_calls": [self._add_call(event)]}

    async def _spoken(self, form: str) -> AsyncIterator[dict[str, Any]]:
        """The id comes once, and the data can be joined: clients add all strings up."""
        self._remember()  # a reply that is cut is known as far as it went
        encoder, pieces = Encoder(form, self.rate_hz), sse.Base64Pieces()
        new: dict[str, Any] = {"id": self.audio_id}
        async for event in self.reply:
            if new and isinstance(event, Done):  # nothing was said: there is no sound to end
                continue
            for part in await self._parts(event, encoder, pieces):
                yield {"audio": new | part}
                new = {}
            if isinstance(event, ToolCall):
                yield {"tool_calls": [self._add_call(event)]}
        if not new:
            yield {"audio": {"expires_at": self.expires_at}}

    async def _parts(
        self, event: object, encoder: Encoder, pieces: sse.Base64Pieces
    ) -> list[dict[str, Any]]:
        match event:
            case TextDelta(text):
                return [{"transcript": text}]
            case AudioDelta(pcm):
                sound = await asyncio.to_thread(encoder.push, pcm)
                return [{"data": piece} for piece in pieces.push(sound)]
            case Done():
                sound = await asyncio.to_thread(encoder.finish)
                return [{"data": p} for p in (*pieces.push(sound), *pieces.finish())]
        return []

    async def _message(self, pcm: bytes) -> dict[str, Any]:
        said: dict[str, Any] = {"content": self.reply.text or (None if self.calls else "")}
        if self.chat.form and (pcm or self.reply.text):
            said = {"content": None, "audio": await self._audio(self.chat.form, pcm)}
        called = {"tool_calls": self.calls} if self.calls else {}
        return {"role": "assistant", "refusal": None, **said, **called}

    async def _audio(self, form: str, pcm: bytes) -> dict[str, Any]:
        self._remember()
        return {
            "id": self.audio_id,
            "data": await asyncio.to_thread(_base64_file, pcm, form, self.rate_hz),
            "expires_at": self.expires_at,
            "transcript": self.reply.text,
        }

    def _remember(self) -> None:
        self.memory.add(self.audio_id, Said(self.reply, self.expires_at))

    def _add_call(self, call: ToolCall) -> dict[str, Any]:
        """The call as a part of a stream, which numbers it."""
        number = len(self.calls)
        function = {"name": call.name, "arguments": call.arguments}
        told = {"id": f"call_{self.reply.id}_{number}", "type": "function", "function": function}
        self.calls.append(told)
        return {"index": number, **told}

    def _finish(self) -> str:
        if self.calls:
            return "tool_calls"
        done = self._done()
        finishes = (done.text_finish, *((done.speech_finish,) if self.chat.form else ()))
        return "length" if "length" in finishes else "stop"

    def _done(self) -> Done:
        assert self.reply.done is not None  # a reply without an end raises
        return self.reply.done

    def _usage(self) -> dict[str, Any]:
        return completion_usage(self._done())

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self.chat.include_usage else {}
        return sse.data(self._object("chat.completion.chunk", [choice]) | usage)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.reply.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def _base64_file(pcm: bytes, form: str, rate_hz: int) -> str:
    return base64.b64encode(encode(pcm, form, rate_hz)).decode()
