"""Settings on the wire, field by field: each is applied or refused by its name."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from omnispeech.errors import RequestError
from omnispeech.server.realtime.protocol.client_events import shown
from omnispeech.server.realtime.protocol.refusals import ProtocolError
from omnispeech.server.realtime.protocol.sizes import MAX_FIELD_BYTES


@dataclass(slots=True)
class Read:
    """What an object asks to change, and what of it is refused."""

    changes: dict[str, Any] = field(default_factory=dict)
    refused: list[ProtocolError] = field(default_factory=list)


Reader = Callable[[Any, str], Read]  # of a value and its place
Check = Callable[[Any], Any]  # gives the value to set; raises RequestError with what is allowed


def leaf(name: str, check: Check) -> Reader:
    """Sets `name`; the refusal names the place and the value."""

    def read(value: Any, place: str) -> Read:
        try:
            return Read({name: check(value)})
        except RequestError as exc:
            code = getattr(exc, "code", "invalid_value")
            message = f"{place}={shown(value)}; {exc}"
            return Read(refused=[ProtocolError(message, code=code, param=place)])

    return read


def checked(check: Check) -> Reader:
    """Sets nothing: the only value allowed is the one in effect."""

    def read(value: Any, place: str) -> Read:
        return Read(refused=leaf("", check)(value, place).refused)

    return read


def group(readers: Mapping[str, Reader]) -> Reader:
    """An object, in which what is not named stays as it is."""

    def read(value: Any, place: str) -> Read:
        if not isinstance(value, dict):
            message = f"{place}={shown(value)}; send an object"
            return Read(refused=[ProtocolError(message, param=place)])
        whole = Read()
        for name, item in value.items():
            one = readers.get(name, _unknown(readers))(item, f"{place}.{name}")
            whole.changes |= one.changes
            whole.refused += one.refused
        return whole

    return read


def _unknown(readers: Mapping[str, Reader]) -> Reader:
    def read(value: Any, place: str) -> Read:
        message = f"{place} is not known; known: {', '.join(readers)}"
        return Read(refused=[ProtocolError(message, code="unknown_parameter", param=place)])

    return read


def unsupported(reason: str, *allowed: Any) -> Check:
    """None and what is empty are allowed too: nothing is asked."""

    def check(value: Any) -> Any:
        if value not in (None, [], {}, *allowed):
            raise ProtocolError(reason, code="unsupported")
        return value

    return check


def whole_number(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise RequestError(f"allowed: whole numbers from {low} to {high}")
        return value

    return check


def number(low: float, high: float) -> Check:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RequestError(f"allowed: {low:g} to {high:g}")
        if not low <= value <= high:
            raise RequestError(f"allowed: {low:g} to {high:g}")
        return float(value)

    return check


def text(max_characters: int) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise RequestError("allowed: a string")
        check_length("it", value, max_characters)
        return value

    return check


def check_length(what: str, value: Any, max_characters: int) -> None:
    """Of a string, or of what is told as JSON: a session has to fit into a frame."""
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(written) > max_characters:
        raise RequestError(f"{what} has {len(written)} characters; allowed: {max_characters}")
    size = len(json.dumps(value, ensure_ascii=False).encode())
    if size > MAX_FIELD_BYTES:
        raise RequestError(f"{what} takes {size} bytes of JSON; allowed: {MAX_FIELD_BYTES}")


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError("allowed: true and false")
    return value


def one_of(*allowed: str) -> Check:
    def check(value: Any) -> str:
        if value not in allowed:
            raise RequestError(f"allowed: {', '.join(allowed)}")
        return str(value)

    return check


def or_null(check: Check, default: Any = None) -> Check:
    """null: the default."""
    return lambda value: default if value is None else check(value)
