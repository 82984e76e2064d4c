"""The session of a live conversation: what is in effect, and how an update changes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from omnispeech.audio.formats import PCM_24K, AudioFormat
from omnispeech.engine.events import Tool
from omnispeech.server.realtime.protocol.client_events import shown
from omnispeech.server.realtime.protocol.refusals import ProtocolError
from omnispeech.server.realtime.settings.field_values import (
    MAX_NAME,
    NO_TRANSCRIPTION,
    UNSUPPORTED,
    Modality,
    Truncation,
    audio_format,
    metadata,
    modality,
    old_modality,
    token_limit,
    tool_choice,
    transcription,
    truncation,
    voice,
)
from omnispeech.server.realtime.settings.fields import (
    Read,
    Reader,
    checked,
    flag,
    group,
    leaf,
    number,
    one_of,
    or_null,
    text,
    unsupported,
)
from omnispeech.server.realtime.settings.tools import described_tool, tools
from omnispeech.server.realtime.settings.turn_settings import DEFAULT, ServerVAD, turn_detection
from omnispeech.server.voices import VOICE

MAX_TEMPERATURE = 2.0
# what a model may not be able to take, by its names in EngineStatus -> in a session
UNABLE = {"tools": "tools", "tool_calls": "item.function_call"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplySettings:
    """How the model replies."""

    modality: Modality = "audio"
    instructions: str = ""
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"  # or "none"
    parallel_tool_calls: bool = True  # False: of several calls the first one counts
    max_output_tokens: int | None = None  # of text; None: reply_tokens
    temperature: float = 1.0
    output_format: AudioFormat = PCM_24K
    truncation: Truncation = Truncation()
    reply_tokens: int = 256  # of a reply where the client names no limit
    max_text_chars: int = 200_000  # of the instructions, and of the tools
    unable: Mapping[str, str] = field(default_factory=dict)  # EngineStatus.unsupported

    @property
    def speech(self) -> bool:
        return self.modality == "audio"

    @property
    def output_modalities(self) -> tuple[str, ...]:
        return (self.modality,)

    @property
    def max_new_tokens(self) -> int:
        return self.max_output_tokens or self.reply_tokens

    def _readers(self) -> dict[str, Reader]:
        """Of the fields that a session and a single response have in common."""
        return {
            "instructions": leaf("instructions", or_null(text(self.max_text_chars), "")),
            "output_modalities": leaf("modality", modality),
            "modalities": leaf("modality", old_modality),
            "tools": tools(self.max_text_chars, self.unable.get("tools")),
            "tool_choice": leaf("tool_choice", tool_choice),
            "parallel_tool_calls": leaf("parallel_tool_calls", or_null(flag, True)),
            "max_output_tokens": leaf("max_output_tokens", token_limit),
            "max_response_output_tokens": leaf("max_output_tokens", token_limit),
            "temperature": leaf("temperature", or_null(number(0.0, MAX_TEMPERATURE), 1.0)),
            "voice": checked(voice),
            "output_audio_format": leaf("output_format", audio_format),
            **{name: refused(name) for name in ("prompt", "reasoning")},
        }

    def _output(self) -> dict[str, Any]:
        return {"format": self.output_format.described(), "voice": VOICE}


def refused(path: str, *allowed: Any) -> Reader:
    return checked(unsupported(UNSUPPORTED[path], *allowed))


OUTPUT = {
    "format": leaf("output_format", audio_format),
    "voice": checked(voice),
    "speed": refused("audio.output.speed", 1, 1.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseSettings(ReplySettings):
    """Of one response: those of the session, and what response.create puts in their place."""

    out_of_band: bool = False  # the conversation is not told of it
    input: tuple[dict[str, Any], ...] | None = None  # items in place of the conversation's
    metadata: dict[str, str] | None = None

    def described(self) -> dict[str, Any]:
        """Fields of a response object."""
        return {
            "output_modalities": list(self.output_modalities),
            "max_output_tokens": self.max_new_tokens,
            "audio": {"output": self._output()},
            "metadata": self.metadata,
        }

    def read(self, response: Mapping[str, Any]) -> Read:
        """null is as if it were left out: what the session says counts (LiveKit sends nulls)."""
        asked = {name: value for name, value in response.items() if value is not None}
        conversation = or_null(one_of("auto", "none"), "auto")
        own = {
            "conversation": leaf("out_of_band", lambda v: conversation(v) == "none"),
            "input": _input,
            "metadata": leaf("metadata", metadata),
            "audio": group({"output": group(OUTPUT)}),
        }
        return group(self._readers() | own)(asked, "response")


def _input(value: Any, place: str) -> Read:
    if value is None:
        return Read()
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        message = f"{place}={shown(value)}; send a list of items"
        return Read(refused=[ProtocolError(message, param=place)])
    return Read({"input": tuple(value)})


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings(ReplySettings):
    input_format: AudioFormat = PCM_24K
    turn_detection: ServerVAD | None = DEFAULT  # None: the client commits its turns
    transcription: bool = False  # what users say is written down
    may_transcribe: bool = False  # the server offers it

    def updated(self, patch: Mapping[str, Any]) -> tuple["SessionSettings", list[ProtocolError]]:
        """What the patch does not name stays; null clears. All but what is refused is applied."""
        kind = patch.get("type", "realtime")
        if kind != "realtime":
            return self, [_wrong_kind(kind)]
        found = group(self._readers() | self._session_readers())(patch, "session")
        return replace(self, **found.changes), found.refused

    def for_response(
        self, response: Mapping[str, Any]
    ) -> tuple[ResponseSettings, list[ProtocolError]]:
        """Nothing of a response with refusals should be done."""
        common = {f.name: getattr(self, f.name) for f in fields(ReplySettings)}
        plain = ResponseSettings(**common)
        found = plain.read(response)
        asked = replace(plain, **found.changes)
        usable = asked.tools if asked.tool_choice == "auto" else ()
        return replace(asked, tools=usable), found.refused

    def for_turn(self) -> ResponseSettings:
        """Of a response that nobody asked for in words."""
        return self.for_response({})[0]

    def described(self, session_id: str, model: str, expires_at: int) -> dict[str, Any]:
        """In full. expires_at: seconds since 1970."""
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": session_id,
            "model": model,
            "expires_at": expires_at,
            "output_modalities": list(self.output_modalities),
            "instructions": self.instructions,
            "tools": [described_tool(tool) for tool in self.tools],
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "max_output_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "truncation": self.truncation.described(),
            "prompt": None,
            "reasoning": None,
            "tracing": None,
            "include": None,
            "audio": {"input": self._input(model), "output": self._output() | {"speed": 1.0}},
            "unsupported": self._unsupported(),
        }

    def _input(self, model: str) -> dict[str, Any]:
        return {
            "format": self.input_format.described(),
            "noise_reduction": None,
            "transcription": {"model": model} if self.transcription else None,
            "turn_detection": self.turn_detection and self.turn_detection.described(),
        }

    def _unsupported(self) -> dict[str, str]:
        of_model = {UNABLE[name]: reason for name, reason in self.unable.items()}
        deaf = {} if self.may_transcribe else {"audio.input.transcription": NO_TRANSCRIPTION}
        return UNSUPPORTED | of_model | deaf

    def _session_readers(self) -> dict[str, Reader]:
        transcribe = transcription(self.may_transcribe)
        vad = turn_detection(self.turn_detection)
        input_format = leaf("input_format", audio_format)
        quiet = refused("audio.input.noise_reduction")
        heard = {
            "format": input_format,
            "noise_reduction": quiet,
            "transcription": transcribe,
            "turn_detection": vad,
        }
        return {
            "type": checked(lambda value: value),
            "model": checked(or_null(text(MAX_NAME))),  # there is one, whatever it is called
            "truncation": truncation,
            "include": refused("include"),
            "tracing": refused("tracing", "auto"),
            "audio": group({"input": group(heard), "output": group(OUTPUT)}),
            "input_audio_format": input_format,
            "input_audio_transcription": transcribe,
            "input_audio_noise_reduction": quiet,
            "turn_detection": vad,
            "speed": OUTPUT["speed"],
        }


def _wrong_kind(kind: Any) -> ProtocolError:
    return ProtocolError(
        f"session.type={shown(kind)}; the one kind of session is realtime (what users say is "
        "written down beside their turns: session.audio.input.transcription)",
        code="unsupported",
        param="session.type",
    )
