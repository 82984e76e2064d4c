"""Functions that the model may call: into the prompt, and out of what it writes.

A call is written as Qwen3 does it: `<tool_call>`, a JSON object with `name` and `arguments`,
`</tool_call>`.
"""

import json
from typing import Any

from omnispeech.engine.events import Tool, ToolCall
from omnispeech.errors import RequestError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


def described(tool: Tool) -> dict[str, Any]:
    """In the shape that chat templates expect. Raises RequestError if it is no JSON."""
    try:
        parameters = json.loads(json.dumps(dict(tool.parameters) or NO_PARAMETERS))
    except (TypeError, ValueError, RecursionError) as exc:
        raise RequestError(f"the parameters of the tool {tool.name!r} are no JSON: {exc}") from exc
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def described_call(call: ToolCall) -> dict[str, Any]:
    """Likewise, a call of an earlier turn."""
    arguments = _json(call.arguments)
    if not isinstance(arguments, dict):
        raise RequestError(
            f"the arguments of the call of {call.name!r} are {call.arguments[:80]!r}; "
            "send a JSON object as text"
        )
    return {"type": "function", "function": {"name": call.name, "arguments": arguments}}


class CallReader:
    """Tells words from calls in the text of one reply, as it comes.

    What stands between the marks and is no call is given as words, marks included. Spaces beside
    a call belong to it.
    """

    def __init__(self) -> None:
        self.begun = False  # a call; nothing is spoken from here on
        self._worded = False  # there were words
        self._rest = ""  # not told apart yet

    @property
    def holds(self) -> bool:
        """Some of the text that came is not told apart yet."""
        return bool(self._rest)

    @property
    def undecided(self) -> bool:
        """It is not known yet whether what came last is spoken."""
        return self.holds or not self._worded

    def push(self, text: str) -> list[str | ToolCall]:
        pieces: list[str | ToolCall] = []
        self._rest += text
        while (start := self._rest.find(OPEN)) >= 0:
            words = self._rest[:start].rstrip()
            pieces += self._words(words)
            self._rest = self._rest[len(words) :]
            self.begun = True
            written, closed, after = self._rest.partition(CLOSE)
            if not closed:
                return pieces
            pieces.append(_call(written.lstrip().removeprefix(OPEN)) or written + closed)
            self._rest = after
        end = _certain(self._rest)
        words, self._rest = self._rest[:end], self._rest[end:]
        return [*pieces, *self._words(words)]

    def finish(self) -> list[str | ToolCall]:
        """The text has ended: what was held is words, but for spaces after a call."""
        words, self._rest = self._rest, ""
        return self._words(words if words.strip() or not self.begun else "")

    def _words(self, text: str) -> list[str | ToolCall]:
        self._worded = self._worded or bool(text.strip())
        return [text] if text else []


def _certain(text: str) -> int:
    """Up to where a text that has no call in it can not become one: spaces before a call, and the
    first characters of its mark, may."""
    begun = next(n for n in range(len(OPEN) - 1, -1, -1) if text.endswith(OPEN[:n]))
    return len(text[: len(text) - begun].rstrip())


def _call(written: str) -> ToolCall | None:
    call = _json(written)
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not name or not isinstance(arguments, dict):
        return None
    try:
        told = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        f"{name}{told}".encode()
    except ValueError:  # Python reads NaN and half characters, which cannot be sent on
        return None
    return ToolCall(name, told)


def _json(text: str) -> Any:
    """None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
