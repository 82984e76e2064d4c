"""The seam between the engine and everything that talks to it. No torch here.

A caller builds a `TurnRequest`, iterates over `SpeechEngine.answer(request)` and gets `TextDelta`,
`AudioDelta` and `ToolCall` as they are made, then one `Done`. Leaving the iterator early cancels
the turn.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from omnispeech.errors import RequestError
from omnispeech.phases import Phase

INPUT_RATE_HZ = 16_000
ROLES = ("system", "user", "assistant")  # of messages that are spoken or written
TOOL = "tool"  # the role of what a function gave

Samples = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """What was said: [N] float32 in [-1, 1], mono, 16 kHz."""

    samples: Samples


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called; in a history, one that it wanted."""

    name: str
    arguments: str  # a JSON object


@dataclass(frozen=True, slots=True, eq=False)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)  # a JSON Schema


@dataclass(frozen=True, slots=True)
class Message:
    """role TOOL: the result of a call, as text."""

    role: str
    content: tuple[Text | Audio, ...]
    tool_calls: tuple[ToolCall, ...] = ()  # of the assistant

    def __post_init__(self) -> None:
        if self.role not in (*ROLES, TOOL):
            raise RequestError(f"unknown role {self.role!r}; known: {', '.join(ROLES)}")
        if self.tool_calls and self.role != "assistant":
            raise RequestError(
                f"a message of the {self.role} calls functions; only the assistant does"
            )


# fields of TurnRequest -> what they may be, and what to send
SAMPLING: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: 0.0 <= value <= 10.0, "send 0 (greedy) to 10"),
    "top_p": (lambda value: 0.0 < value <= 1.0, "send more than 0, at most 1"),
    "speech_temperature": (lambda value: 0.0 <= value <= 10.0, "send 0 (greedy) to 10"),
    "seed": (lambda value: value is None or 0 <= value < 2**63, "send 0 to 2**63 - 1"),
}


def check_sampling(name: str, value: float | None) -> None:
    """name: of SAMPLING. Raises RequestError."""
    is_allowed, allowed = SAMPLING[name]
    if not is_allowed(value):
        raise RequestError(f"{name}={value}; {allowed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """One reply asked for. The defaults are those of the original worker."""

    messages: tuple[Message, ...]
    speech: bool = True  # False: text alone
    script: str | None = None  # the reply is this text, whole; None: the model's own words
    tools: tuple[Tool, ...] = ()
    max_new_tokens: int = 256  # of the model's own words
    temperature: float = 1.0
    top_p: float = 1.0
    speech_temperature: float = 1.0
    seed: int | None = None  # None: drawn at random, told in Done
    can_shorten: bool = False  # a prompt that leaves the reply little room is refused as too long

    def __post_init__(self) -> None:
        if not self.messages:
            raise RequestError("messages is empty; send at least one message of the user")
        if self.script is not None and not self.script.strip():
            raise RequestError("the text to be spoken is empty; send some words")
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens={self.max_new_tokens}; send 1 or more")
        for name in SAMPLING:
            check_sampling(name, getattr(self, name))


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str
    from_s: float = 0.0  # seconds of the reply's sound before which it cannot be heard


@dataclass(frozen=True, slots=True)
class AudioDelta:
    pcm: bytes  # 16-bit little endian, mono, at SpeechEngine.sample_rate_hz


Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The reply is whole. "stop": the model ended it; "length": a limit did."""

    text_finish: Finish
    speech_finish: Finish
    prompt_tokens: int
    text_tokens: int
    units: int
    seed: int
    first_text_s: float  # from the call of answer() to the first TextDelta; 0 if there was none
    first_audio_s: float  # likewise to the first AudioDelta
    total_s: float
    audio_s: float  # seconds of sound in the reply
    audio_tokens: int = 0  # of prompt_tokens, those that stand for sound
    cached_tokens: int = 0  # of prompt_tokens, those an earlier turn had read
    queue_s: float = 0.0  # from the call of answer() until there was a place on the device

    @property
    def real_time_factor(self) -> float:
        """Seconds of work per second of sound; infinite if there was no sound."""
        return self.total_s / self.audio_s if self.audio_s else float("inf")


Event = TextDelta | AudioDelta | ToolCall | Done


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    ready: bool  # a warm-up turn has made sound
    running: int = 0  # conversations on the device
    waiting: int = 0  # conversations in the queue
    max_running: int = 0
    max_waiting: int = 0
    failure: str | None = None  # why it will never be ready
    phases: dict[str, Phase] = field(default_factory=dict)  # of the start, in order
    kv_tokens: int = 0  # positions of all conversations together, per language model
    kv_used: int = 0  # of those, taken or kept for a next turn
    device_bytes: int = 0  # memory of the device in use; 0: not known
    # "tools" and "tool_calls" (results too), where the model cannot take them -> what to do;
    # known before it is ready
    unsupported: Mapping[str, str] = field(default_factory=dict)


class SpeechEngine(Protocol):
    @property
    def sample_rate_hz(self) -> int:
        """Of the sound in AudioDelta; known once the engine is ready."""
        ...

    def status(self) -> EngineStatus: ...

    def answer(self, request: TurnRequest) -> AsyncGenerator[Event, None]:
        """Raises Overloaded or NotReady, or RequestError, before the first event."""
        ...
