"""Items as clients write them -> items of the conversation."""

import json
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError
from pydantic_core import from_json

from omnispeech.audio.formats import AudioFormat
from omnispeech.audio.resample import Resampler
from omnispeech.engine.events import INPUT_RATE_HZ, Samples
from omnispeech.server.realtime.items.kinds import (
    FunctionCall,
    FunctionOutput,
    Item,
    MessageItem,
    Part,
    Role,
    Spoken,
    Written,
)
from omnispeech.server.realtime.protocol.client_events import (
    CODES,
    Id,
    dotted,
    field_refusal,
    shown,
    sound_bytes,
)
from omnispeech.server.realtime.protocol.ids import new_id
from omnispeech.server.realtime.protocol.refusals import ProtocolError
from omnispeech.server.realtime.protocol.sizes import MAX_FRAME_BYTES

M = TypeVar("M", bound=BaseModel)

MAX_PARTS = 100  # of one message
KINDS_OF_PARTS: dict[Role, tuple[str, ...]] = {
    "system": ("input_text",),
    "user": ("input_text", "input_audio"),
    "assistant": ("output_text", "output_audio"),
}
# what other models take -> why this one does not
UNSUPPORTED = {
    "input_image": "the model does not see; send input_text or input_audio",
    "mcp": "the server calls no MCP servers; send function_call and function_call_output",
}


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: Id | None = None
    object: Literal["realtime.item"] | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None  # it has no effect


class _WirePart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: StrictStr
    text: StrictStr | None = None
    audio: StrictStr | None = None
    transcript: StrictStr | None = None


class _WireMessage(_Wire):
    type: Literal["message"]
    role: Role
    content: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_PARTS)]


class _WireCall(_Wire):
    type: Literal["function_call"]
    name: Annotated[StrictStr, Field(min_length=1)]
    arguments: StrictStr
    call_id: Id | None = None


class _WireOutput(_Wire):
    type: Literal["function_call_output"]
    call_id: Id
    output: StrictStr


KINDS: dict[str, type[_Wire]] = {
    "message": _WireMessage,
    "function_call": _WireCall,
    "function_call_output": _WireOutput,
}


def read_item(
    wire: dict[str, Any], form: AudioFormat, max_audio_s: float, place: str = "item"
) -> Item:
    """Decodes sound too, which is in `form`. place: where `wire` is in the client's event."""
    item = _read(_valid(_kind_of(wire, place), wire, place), form, max_audio_s, place)
    size = len(json.dumps(item.described(), ensure_ascii=False).encode())
    if size > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"{place} takes {size} bytes of JSON without its sound; allowed: {MAX_FRAME_BYTES}",
            code="item_too_large",
            param=place,
        )
    return item


def _read(given: _Wire, form: AudioFormat, max_audio_s: float, place: str) -> Item:
    item_id = given.id or new_id("item")
    match given:
        case _WireMessage():
            content = [
                _part(given.role, part, form, max_audio_s, dotted(place, ("content", number)))
                for number, part in enumerate(given.content)
            ]
            return MessageItem(item_id, given.role, tuple(content))
        case _WireCall():
            _check_arguments(given.arguments, f"{place}.arguments")
            return FunctionCall(
                item_id, given.call_id or new_id("call"), given.name, given.arguments
            )
        case _WireOutput():
            return FunctionOutput(item_id, given.call_id, given.output)
    raise AssertionError(given)


def _kind_of(wire: dict[str, Any], place: str) -> type[_Wire]:
    kind, param = wire.get("type"), f"{place}.type"
    if kind is None:
        message = f"{param} is missing; known: {', '.join(KINDS)}"
        raise ProtocolError(message, code=CODES["missing"], param=param)
    if isinstance(kind, str) and kind.startswith("mcp_"):
        message = f"{param}={shown(kind)}; {UNSUPPORTED['mcp']}"
        raise ProtocolError(message, code="unsupported", param=param)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ProtocolError(f"{param}={shown(kind)}; known: {', '.join(KINDS)}", param=param)
    return KINDS[kind]


def _valid(model: type[M], wire: dict[str, Any], place: str) -> M:
    try:
        return model.model_validate(wire)
    except ValidationError as exc:
        raise field_refusal(exc.errors(include_url=False)[0], model, place) from exc


def _part(
    role: Role, wire: dict[str, Any], form: AudioFormat, max_audio_s: float, place: str
) -> Part:
    kind, known = wire.get("type"), KINDS_OF_PARTS[role]
    if kind == "input_image":
        message = f"{place}.type={shown(kind)}; {UNSUPPORTED['input_image']}"
        raise ProtocolError(message, code="unsupported", param=f"{place}.type")
    if kind not in known:
        message = f"{place}.type={shown(kind)}; known for the role {role}: {', '.join(known)}"
        raise ProtocolError(message, param=f"{place}.type")
    part = _valid(_WirePart, wire, place)
    if kind == "input_audio":
        samples = _sound(_needed(part, "audio", place), form, max_audio_s, f"{place}.audio")
        _refuse(part, ("text",), place)
        return Spoken.of(samples, part.transcript)
    if kind == "output_audio":
        _refuse(part, ("text", "audio"), place)
        return Written(_needed(part, "transcript", place), kind)
    _refuse(part, ("audio", "transcript"), place)
    return Written(_needed(part, "text", place), kind)


def _needed(part: _WirePart, name: str, place: str) -> str:
    value = getattr(part, name)
    if value is None:
        param = f"{place}.{name}"
        raise ProtocolError(f"{param} is missing; send it", code=CODES["missing"], param=param)
    return str(value)


def _refuse(part: _WirePart, names: tuple[str, ...], place: str) -> None:
    """What a part of this type does not have."""
    for name in names:
        if getattr(part, name) is not None:
            param = f"{place}.{name}"
            message = f"{param} is not taken with type {part.type}; leave it out"
            raise ProtocolError(message, code="unsupported", param=param)


def _sound(text: str, form: AudioFormat, max_audio_s: float, place: str) -> Samples:
    try:
        data = sound_bytes(text)
    except ValueError as exc:
        raise ProtocolError(f"{place}={shown(text)} is not base64: {exc}", param=place) from exc
    if not data or len(data) % form.bytes_per_sample:
        raise ProtocolError(
            f"{place} has {len(data)} bytes; send whole samples of {form.bytes_per_sample} bytes "
            f"in the session's input format ({form.type})",
            param=place,
        )
    if (seconds := form.milliseconds(len(data)) / 1000) > max_audio_s:
        raise ProtocolError(
            f"{place} is {seconds:.1f} s long; send at most {max_audio_s:g} s "
            "(the server's max_audio_s)",
            param=place,
        )
    resampler = Resampler(form.rate, INPUT_RATE_HZ)
    pieces = resampler.push(form.decode(data)), resampler.finish()
    return np.concatenate(pieces)


def _check_arguments(text: str, place: str) -> None:
    try:
        arguments = from_json(text)
    except ValueError as exc:
        raise ProtocolError(f"{place} is not valid JSON: {exc}", param=place) from exc
    if not isinstance(arguments, dict):
        raise ProtocolError(f"{place}={shown(text)}; send a JSON object in a string", param=place)
