"""Functions that the model may call, as the protocol writes them."""

import json
import re
from typing import Any

from omnispeech.engine.events import Tool
from omnispeech.errors import RequestError
from omnispeech.server.realtime.protocol.client_events import shown
from omnispeech.server.realtime.protocol.refusals import ProtocolError
from omnispeech.server.realtime.protocol.sizes import MAX_FIELD_BYTES
from omnispeech.server.realtime.settings.field_values import UNSUPPORTED
from omnispeech.server.realtime.settings.fields import Read, Reader

MAX_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
FIELDS = ("type", "name", "description", "parameters")


def tools(max_characters: int, unsupported: str | None = None) -> Reader:
    """Sets `tools`: those that can be used; each of the others is refused.

    unsupported: why the model can use none.
    """

    def read(value: Any, place: str) -> Read:
        if value is None:
            return Read({"tools": ()})
        if not isinstance(value, list) or len(value) > MAX_TOOLS:
            message = f"{place}={shown(value)}; send a list of at most {MAX_TOOLS} tools"
            return Read(refused=[ProtocolError(message, param=place)])
        if value and unsupported:
            message = f"{place}={shown(value)}; {unsupported}"
            return Read(refused=[ProtocolError(message, code="unsupported", param=place)])
        offer, refused = _Offer(min(max_characters, MAX_FIELD_BYTES)), []
        for number, item in enumerate(value):
            try:
                offer.add(_tool(item))
            except RequestError as exc:
                where = f"{place}[{number}]"
                code = getattr(exc, "code", "invalid_value")
                message = f"{where}={shown(item)}; {exc}"
                refused.append(ProtocolError(message, code=code, param=where))
        return Read({"tools": tuple(offer.tools.values())}, refused)

    return read


class _Offer:
    """Tools that go together. most: characters of their JSON."""

    def __init__(self, most: int) -> None:
        self.tools: dict[str, Tool] = {}
        self._most = most
        self._length = 0

    def add(self, tool: Tool) -> None:
        if tool.name in self.tools:
            raise RequestError("another tool has this name; give each its own")
        length = self._length + len(json.dumps(described_tool(tool)))
        if length > self._most:
            raise RequestError(f"the tools would have {length} characters; allowed: {self._most}")
        self._length = length
        self.tools[tool.name] = tool


def _tool(item: Any) -> Tool:
    if not isinstance(item, dict):
        raise RequestError("send an object with type, name, description and parameters")
    if item.get("type") == "mcp":
        raise ProtocolError(UNSUPPORTED["tools.mcp"], code="unsupported")
    if item.get("type") != "function":
        raise RequestError("its type is not function, the one type known")
    if unknown := sorted(item.keys() - set(FIELDS)):
        known = ", ".join(FIELDS)
        message = f"{unknown[0]} is not known; known: {known}"
        raise ProtocolError(message, code="unknown_parameter")
    tool = Tool(item.get("name", ""), item.get("description") or "", item.get("parameters") or {})
    _check_types(tool)
    return tool


def _check_types(tool: Tool) -> None:
    if not isinstance(tool.name, str) or not NAME.fullmatch(tool.name):
        raise RequestError("its name has to be 1 to 64 letters, digits, _ and -")
    if not isinstance(tool.description, str):
        raise RequestError("its description has to be a string")
    if not isinstance(tool.parameters, dict):
        raise RequestError("its parameters have to be an object, a JSON Schema")


def described_tool(tool: Tool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
    }
