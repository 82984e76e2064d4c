"""The messages of a chat completion -> those of a turn. What is wrong is refused with its place."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from omnispeech.config import ServerConfig
from omnispeech.engine.events import INPUT_RATE_HZ, TOOL, Audio, Message, Samples, Text, ToolCall
from omnispeech.errors import AudioError
from omnispeech.server.openai.audio_memory import AudioMemory
from omnispeech.server.openai.fields import UNSUPPORTED, without_neutral
from omnispeech.server.openai.refusals import Refused
from omnispeech.server.protocol import MAX_REQUEST_AUDIO_S, check_length, sound_of_base64

ROLES = {"system": "system", "developer": "system", "user": "user"}
ROLES |= {"assistant": "assistant", "tool": TOOL}  # of the protocol -> of the engine
# Clients send a message back as they got it, with all its fields.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "name": (),
    "refusal": ("",),
    "annotations": ([],),
    "function_call": (),
}


def _parts(content: object) -> object:
    """A string or a list of parts -> a list of parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("content", "send a string or a list of parts")
    return content


class InputAudio(BaseModel):
    model_config = ConfigDict(extra="forbid")
    data: str  # base64 of a sound file
    format: str | None = None  # the file itself says what it is


class Part(BaseModel):
    """What it holds is in the field that is called as its type."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "input_audio"]
    text: str | None = None
    input_audio: InputAudio | None = None


class AudioReference(BaseModel):
    id: str


class CalledFunction(BaseModel):
    name: str
    arguments: str


class WireCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class WireMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Part], BeforeValidator(_parts)] = Field(default_factory=list)
    audio: AudioReference | None = None  # an earlier spoken reply
    tool_calls: list[WireCall] = Field(default_factory=list)
    tool_call_id: str | None = None


def without_neutral_fields(messages: object) -> object:
    """Before they are read, as they came."""
    if not isinstance(messages, list):
        return messages
    return [_cleaned(place, m) if isinstance(m, dict) else m for place, m in enumerate(messages)]


def _cleaned(place: int, message: dict[str, Any]) -> dict[str, Any]:
    ignored = ("name",) if message.get("role") == "tool" else ()  # of the function: known
    return without_neutral(message, NEUTRAL, ignored, where=f"messages[{place}].")


class MessageReader:
    """Of one request: its sounds together have a limit.

    no_calls: why the model reads no calls of functions.
    """

    def __init__(self, config: ServerConfig, memory: AudioMemory, no_calls: str | None) -> None:
        self._config = config
        self._memory = memory
        self._no_calls = no_calls
        self._seconds_left = MAX_REQUEST_AUDIO_S

    def read(self, wire: list[WireMessage]) -> tuple[Message, ...]:
        """Decodes the sounds: not for the event loop."""
        if len(wire) > self._config.max_messages:
            raise Refused(
                f"the request has {len(wire)} messages; send at most "
                f"{self._config.max_messages} (the server's max_messages)",
                param="messages",
            )
        check_length(sum(map(_characters, wire)), self._config.max_text_chars)
        return tuple(self._message(wire[place], place) for place in in_order_of_calls(wire))

    def _message(self, wire: WireMessage, place: int) -> Message:
        where = f"messages[{place}]"
        _check_fields(wire, where)
        if wire.tool_calls and self._no_calls:
            field = f"{where}.tool_calls"
            raise Refused(f"{field}; {self._no_calls}", param=field, code=UNSUPPORTED)
        content = tuple(self._content(wire, where))
        if not content and not wire.tool_calls:
            raise Refused(f"{where} says nothing; send content", param=f"{where}.content")
        calls = (ToolCall(c.function.name, c.function.arguments) for c in wire.tool_calls)
        return Message(ROLES[wire.role], content, tuple(calls))

    def _content(self, wire: WireMessage, where: str) -> Iterator[Text | Audio]:
        for number, part in enumerate(wire.content):
            place = f"{where}.content[{number}]"
            _check_part(part, place)
            if part.input_audio:
                yield Audio(self._sound(part.input_audio, wire.role, place))
            elif part.text or wire.role == "tool":  # a function may give an empty text
                yield Text(part.text or "")
        if wire.audio:
            yield Text(self._memory.text_of(wire.audio.id, f"{where}.audio.id"))

    def _sound(self, sound: InputAudio, role: str, where: str) -> Samples:
        if role != "user":
            message = f"{where} is sound of role {role!r}; only the user's messages may have sound"
            raise Refused(message, param=where)
        most = min(self._config.max_audio_s, self._seconds_left)
        place = f"{where}.input_audio.data"
        try:
            samples = sound_of_base64(sound.data, place, most)
        except AudioError as exc:
            raise Refused(str(exc), param=place, code="invalid_audio") from exc
        self._seconds_left -= len(samples) / INPUT_RATE_HZ
        return samples


def _characters(message: WireMessage) -> int:
    calls = sum(len(c.function.name) + len(c.function.arguments) for c in message.tool_calls)
    return calls + sum(len(part.text or "") for part in message.content)


def _check_fields(wire: WireMessage, where: str) -> None:
    for name, role in (("audio", "assistant"), ("tool_calls", "assistant")):
        if getattr(wire, name) and wire.role != role:
            message = f"{where}.{name} is a field of role {role!r}, not of {wire.role!r}"
            raise Refused(message, param=f"{where}.{name}")
    if wire.audio and any(part.text for part in wire.content):
        raise Refused(
            f"{where} has content and audio; send the one that was said", param=f"{where}.content"
        )


def _check_part(part: Part, where: str) -> None:
    for name in ("text", "input_audio"):
        field = f"{where}.{name}"
        sent = getattr(part, name) is not None
        if name == part.type and not sent:
            raise Refused(f"{field} is missing; send it", param=field)
        if name != part.type and sent:
            message = f"{field} is no field of type {part.type!r}; send it as a part of its own"
            raise Refused(message, param=field)


def in_order_of_calls(wire: list[WireMessage]) -> Iterator[int]:
    """Places of the messages; the results of tools in the order in which the calls stand.

    A chat template has no ids: it knows the call of a result by its place.
    """
    results: dict[str, int | None] = {}  # of the calls that wait for theirs
    for place, message in enumerate(wire):
        if message.role == "tool":
            _take_result(results, message.tool_call_id, place)
            continue
        yield from _complete(results, f"messages[{place}] comes before")
        yield place
        results = dict.fromkeys(call.id for call in message.tool_calls)
    yield from _complete(results, "there are no messages with")


def _take_result(results: dict[str, int | None], call_id: str | None, place: int) -> None:
    where = f"messages[{place}].tool_call_id"
    if call_id is None or results.get(call_id, place) is not None:
        known = ", ".join(call for call, result in results.items() if result is None)
        raise Refused(
            f"{where}={call_id!r} is no tool call that waits for its result; "
            f"those of the message before: {known or 'none'}",
            param=where,
        )
    results[call_id] = place


def _complete(results: dict[str, int | None], complaint: str) -> list[int]:
    missing = [call for call, place in results.items() if place is None]
    if missing:
        raise Refused(f"{complaint} the results of {', '.join(missing)}", param="messages")
    return [place for place in results.values() if place is not None]
