"""Requests in JSON -> TurnRequest. Everything wrong is refused here, with the place named."""

import base64
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, Strict, ValidationError
from pydantic_core import PydanticCustomError

from omnispeech.audio.io import decode_audio
from omnispeech.config import ServerConfig
from omnispeech.engine.events import (
    INPUT_RATE_HZ,
    ROLES,
    Audio,
    Message,
    Samples,
    Text,
    TurnRequest,
)
from omnispeech.errors import AudioError, RequestError
from omnispeech.server.refusal import field_error

MAX_REQUEST_AUDIO_S = 3600.0  # all items of one request: 230 MB of samples


def _items(content: object) -> object:
    """A string, an item or a list of items -> a list of items."""
    if isinstance(content, str):
        return [{"text": content}]
    if isinstance(content, dict):
        return [content]
    if not isinstance(content, list):
        raise PydanticCustomError("content", "send a string, an item or a list of items")
    return content


def _whole(value: object) -> object:
    """Sliders of web pages send 512.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
WholeNumber = Annotated[int, Strict(), BeforeValidator(_whole)]


class Item(BaseModel):
    text: str | None = None
    audio: str | None = None  # base64 of a sound file


class WireMessage(BaseModel):
    role: str
    content: Annotated[list[Item], BeforeValidator(_items)]


class WorkerRequest(BaseModel):
    """Body of /worker_generate_stream; other keys, such as `model`, are ignored."""

    messages: list[WireMessage]
    max_new_tokens: WholeNumber = 256
    temperature: Number = 1.0
    top_p: Number = 1.0
    speech_temperature: Number = 1.0
    seed: WholeNumber | None = None


def parse_worker_request(body: bytes, config: ServerConfig) -> TurnRequest:
    """Decodes the sounds too: not for the event loop."""
    try:
        wire = WorkerRequest.model_validate_json(body)
    except ValidationError as exc:
        raise field_error(exc.errors(include_url=False)) from exc
    if len(wire.messages) > config.max_messages:
        raise RequestError(
            f"the request has {len(wire.messages)} messages; send at most {config.max_messages} "
            "(the server's max_messages)"
        )
    texts = (item.text or "" for message in wire.messages for item in message.content)
    check_length(sum(map(len, texts)), config.max_text_chars)
    sampling = wire.model_dump(exclude={"messages"})
    return TurnRequest(messages=_messages(wire.messages, config.max_audio_s), **sampling)


def check_length(characters: int, most: int) -> None:
    """A tokenizer stops the whole process while it reads: it must not be given too much."""
    if characters > most:
        raise RequestError(
            f"the text has {characters} characters; send at most {most} "
            "(the server's max_text_chars)"
        )


def _messages(wire: list[WireMessage], max_audio_s: float) -> tuple[Message, ...]:
    seconds_left = MAX_REQUEST_AUDIO_S
    messages = []
    for number, message in enumerate(wire):
        if message.role not in ROLES:
            raise RequestError(
                f"messages[{number}].role={message.role!r}; known: {', '.join(ROLES)}"
            )
        content: list[Text | Audio] = []
        for place, item in enumerate(message.content):
            if item.text:
                content.append(Text(item.text))
            if item.audio:
                where = f"messages[{number}].content[{place}].audio"
                samples = sound_of_base64(item.audio, where, min(max_audio_s, seconds_left))
                seconds_left -= len(samples) / INPUT_RATE_HZ
                content.append(Audio(samples))
        if not content:
            raise RequestError(f"messages[{number}] has neither text nor audio; send one of them")
        messages.append(Message(message.role, tuple(content)))
    return tuple(messages)


def sound_of_base64(text: str, where: str, max_seconds: float) -> Samples:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except ValueError as exc:
        raise AudioError(
            f"{where} is not base64: {str(exc)[:1].lower()}{str(exc)[1:]}; "
            "send a sound file in base64"
        ) from exc
    try:
        return decode_audio(data, max_seconds=max_seconds)
    except AudioError as exc:
        raise AudioError(f"{where}: {exc}") from exc


def spoken_turn(samples: Samples, system: str | None = None, **sampling: Any) -> TurnRequest:
    """One turn of one speaker, without history."""
    question = Message("user", (Audio(samples),))
    before = (Message("system", (Text(system),)),) if system else ()
    return TurnRequest(messages=(*before, question), **sampling)
