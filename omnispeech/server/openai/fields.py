"""Fields of OpenAI's requests: read, left out where they ask for nothing, refused by their name."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from omnispeech.engine.events import SAMPLING, check_sampling
from omnispeech.errors import RequestError
from omnispeech.server.openai.refusals import Refused
from omnispeech.server.refusal import field_error, shown

UNSUPPORTED, UNKNOWN = "unsupported_parameter", "unknown_parameter"


def json_object(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise RequestError("the body is empty; send JSON")
    try:
        given = from_json(body)
    except ValueError as exc:
        raise RequestError(f"the body is not valid JSON: {exc}") from exc
    if not isinstance(given, dict):
        raise RequestError("the body is not a JSON object; send one")
    return given


def field_refusal(exc: ValidationError) -> Refused:
    errors = exc.errors(include_url=False)
    place = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in errors[0]["loc"])
    code = UNKNOWN if errors[0]["type"] == "extra_forbidden" else "invalid_value"
    return Refused(str(field_error(errors)), param=place.lstrip(".") or None, code=code)


def without_neutral(
    body: Mapping[str, Any],
    neutral: Mapping[str, tuple[Any, ...]],
    ignored: tuple[str, ...],
    where: str = "",
) -> dict[str, Any]:
    """The fields that are left to read. null counts as not sent.

    neutral: what the model cannot do, with the values that ask for nothing; any other is refused.
    ignored: fields that change nothing in the answer. where: put before the name in a refusal.
    """
    left = {}
    for name, value in body.items():
        if value is None or name in ignored:
            continue
        if name not in neutral:
            left[name] = value
        elif value not in neutral[name]:
            raise unsupported(where + name, value, neutral[name])
    return left


def unsupported(name: str, value: object, allowed: tuple[Any, ...] = ()) -> Refused:
    told = f" or send {' or '.join(map(repr, allowed))}" if allowed else ""
    message = f"{name}={shown(value)} is not supported by this model; leave it out{told}"
    return Refused(message, param=name, code=UNSUPPORTED)


def checked_sampling(wire: BaseModel) -> dict[str, Any]:
    """The fields of SAMPLING that a request has. Raises Refused by the name of one."""
    given = wire.model_dump(include=set(SAMPLING))
    for name, value in given.items():
        try:
            check_sampling(name, value)
        except RequestError as exc:
            raise Refused(str(exc), param=name) from exc
    return given
