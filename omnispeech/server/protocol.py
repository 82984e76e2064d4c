"""Requests in JSON -> TurnRequest. Everything wrong is refused here, with the place named."""

import base64
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, Strict, ValidationError

from omnispeech.audio.io import decode_audio
from omnispeech.engine.events import INPUT_RATE_HZ, Audio, Message, Samples, Text, TurnRequest
from omnispeech.errors import AudioError, RequestError
from omnispeech.server.refusal import field_error

MAX_NEW_TOKENS = 1024  # more is cut to this, as the original does
MAX_REQUEST_AUDIO_S = 3600.0  # all items of one request: 230 MB of samples


def _items(content: object) -> object:
    """A string, an item or a list of items -> a list of items."""
    if isinstance(content, str):
        return [{"text": content}]
    return [content] if isinstance(content, dict) else content


def _whole(value: object) -> object:
    """Sliders of web pages send 512.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def capped(tokens: int) -> int:
    return min(tokens, MAX_NEW_TOKENS)


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
    max_new_tokens: Annotated[WholeNumber, AfterValidator(capped)] = 256
    temperature: Number = 1.0
    top_p: Number = 1.0
    speech_temperature: Number = 1.0
    seed: WholeNumber | None = None


def parse_worker_request(body: bytes, max_audio_s: float) -> TurnRequest:
    """Decodes the sounds too: not for the event loop."""
    try:
        wire = WorkerRequest.model_validate_json(body)
    except ValidationError as exc:
        raise field_error(exc.errors(include_url=False)) from exc
    sampling = wire.model_dump(exclude={"messages"})
    return TurnRequest(messages=_messages(wire.messages, max_audio_s), **sampling)


def _messages(wire: list[WireMessage], max_audio_s: float) -> tuple[Message, ...]:
    seconds_left = MAX_REQUEST_AUDIO_S
    messages = []
    for number, message in enumerate(wire):
        content: list[Text | Audio] = []
        for place, item in enumerate(message.content):
            if item.text:
                content.append(Text(item.text))
            if item.audio:
                where = f"messages[{number}].content[{place}].audio"
                samples = _sound(item.audio, where, min(max_audio_s, seconds_left))
                seconds_left -= len(samples) / INPUT_RATE_HZ
                content.append(Audio(samples))
        if not content:
            raise RequestError(f"messages[{number}] has neither text nor audio; send one of them")
        messages.append(Message(message.role, tuple(content)))
    return tuple(messages)


def _sound(text: str, where: str, max_seconds: float) -> Samples:
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
