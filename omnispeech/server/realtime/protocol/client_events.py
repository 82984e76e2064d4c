"""What a client says: one class per event. Everything wrong is refused with the place named."""

import base64
from reprlib import Repr
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
)
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from omnispeech.server.realtime.protocol.refusals import ProtocolError

MAX_ID_CHARACTERS = 512
SHOWN_CHARACTERS = 40
CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
WEBRTC_ONLY = ("output_audio_buffer.clear",)

Id = Annotated[StrictStr, Field(min_length=1, max_length=MAX_ID_CHARACTERS)]


def sound_bytes(value: object) -> bytes:
    """Raises ValueError where it is no base64, TypeError where it is no string."""
    if not isinstance(value, str):
        raise TypeError("send a string in base64")
    return base64.b64decode(value, validate=True)


def _decoded(value: object) -> bytes:
    try:
        return sound_bytes(value)
    except (ValueError, TypeError) as exc:
        reason = f"{str(exc)[:1].lower()}{str(exc)[1:]}"
        raise PydanticCustomError("base64", "{reason}", {"reason": reason}) from exc


def _or_empty(value: object) -> object:
    return {} if value is None else value


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    event_id: Id | None = None


class SessionUpdate(_Event):
    type: Literal["session.update"]
    session: dict[str, Any]


class AppendAudio(_Event):
    type: Literal["input_audio_buffer.append"]
    audio: Annotated[bytes, BeforeValidator(_decoded)]  # in the session's input format


class CommitAudio(_Event):
    type: Literal["input_audio_buffer.commit"]


class ClearAudio(_Event):
    type: Literal["input_audio_buffer.clear"]


class CreateItem(_Event):
    type: Literal["conversation.item.create"]
    item: dict[str, Any]
    previous_item_id: Id | None = None


class RetrieveItem(_Event):
    type: Literal["conversation.item.retrieve"]
    item_id: Id


class DeleteItem(_Event):
    type: Literal["conversation.item.delete"]
    item_id: Id


class TruncateItem(_Event):
    type: Literal["conversation.item.truncate"]
    item_id: Id
    content_index: StrictInt
    audio_end_ms: StrictInt


class CreateResponse(_Event):
    type: Literal["response.create"]
    response: Annotated[dict[str, Any], BeforeValidator(_or_empty)] = Field(default_factory=dict)


class CancelResponse(_Event):
    type: Literal["response.cancel"]
    response_id: Id | None = None


ClientEvent = (
    SessionUpdate
    | AppendAudio
    | CommitAudio
    | ClearAudio
    | CreateItem
    | RetrieveItem
    | DeleteItem
    | TruncateItem
    | CreateResponse
    | CancelResponse
)

KINDS: dict[str, type[_Event]] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(ClientEvent)
}


def parse(text: str) -> ClientEvent:
    """Raises ProtocolError, with the event's own id if it has one."""
    fields = _object(text)
    try:
        return _event(fields)
    except ProtocolError as exc:
        event_id = fields.get("event_id")
        told = isinstance(event_id, str) and len(event_id) <= MAX_ID_CHARACTERS
        raise exc.of_event(event_id if told else None) from exc


def _object(text: str) -> dict[str, Any]:
    try:
        value = from_json(text, allow_inf_nan=False)
    except ValueError as exc:
        raise ProtocolError(
            f"the event is not valid JSON: {exc}; send one JSON object per frame",
            code="invalid_json",
        ) from exc
    if not isinstance(value, dict):
        raise ProtocolError(
            f"the event is {shown(value)}; send a JSON object with a type", code="invalid_event"
        )
    return value


def _event(fields: dict[str, Any]) -> Any:
    kind = fields.get("type")
    if kind is None:
        raise ProtocolError(
            f"type is missing; known: {', '.join(KINDS)}", code=CODES["missing"], param="type"
        )
    if kind in WEBRTC_ONLY:
        raise ProtocolError(
            f"{kind} is for WebRTC and SIP; on a WebSocket send response.cancel, then "
            "conversation.item.truncate",
            code="unsupported",
            param="type",
        )
    if not isinstance(kind, str) or kind not in KINDS:
        raise ProtocolError(
            f"type={shown(kind)}; known: {', '.join(KINDS)}", code="unknown_event", param="type"
        )
    try:
        return KINDS[kind].model_validate(fields)
    except ValidationError as exc:
        raise field_refusal(exc.errors(include_url=False)[0], KINDS[kind]) from exc


def field_refusal(found: ErrorDetails, model: type[BaseModel], before: str = "") -> ProtocolError:
    """One of pydantic's complaints, in the words of this house. before: the way to the model."""
    param = dotted(before, found["loc"])
    code = CODES.get(found["type"], "invalid_value")
    if code == CODES["missing"]:
        return ProtocolError(f"{param} is missing; send it", code=code, param=param)
    if code == CODES["extra_forbidden"]:
        known = ", ".join(model.model_fields)
        return ProtocolError(f"{param} is not known; known: {known}", code=code, param=param)
    message = found["msg"][:1].lower() + found["msg"][1:]
    return ProtocolError(f"{param}={shown(found['input'])}: {message}", code=code, param=param)


def dotted(before: str, path: tuple[str | int, ...]) -> str:
    """ "item", ("content", 0, "text") -> item.content[0].text"""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return (before + "".join(steps)).removeprefix(".")


SHORT = Repr()  # however much there is of a value
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 2 * SHOWN_CHARACTERS


def shown(value: object) -> str:
    text = SHORT.repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
