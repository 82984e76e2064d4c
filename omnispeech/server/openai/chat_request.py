"""Body of /v1/chat/completions -> what is asked for. Nothing is left out in silence."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError

from omnispeech.audio.encoders import FORMATS
from omnispeech.config import ServerConfig, TalkConfig
from omnispeech.engine.events import Tool, TurnRequest
from omnispeech.server.openai.audio_memory import AudioMemory
from omnispeech.server.openai.chat_messages import (
    MessageReader,
    WireMessage,
    without_neutral_fields,
)
from omnispeech.server.openai.fields import (
    UNSUPPORTED,
    checked_sampling,
    field_refusal,
    json_object,
    without_neutral,
)
from omnispeech.server.openai.models import check_model
from omnispeech.server.openai.refusals import Refused
from omnispeech.server.protocol import Number, WholeNumber, check_length
from omnispeech.server.refusal import shown
from omnispeech.server.voices import voice_problem

MAX_TOOLS = 128
HEADED = "wav"  # its header says how long it is: an event of a stream cannot
# What the model cannot do, and the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "prediction": (),
    "parallel_tool_calls": (True,),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "web_search_options": (),
    "moderation": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": (),
    "prompt_cache_options": (),
}
# They change nothing in an answer.
BOOKKEEPING = ("user", "metadata", "safety_identifier", "prompt_cache_key")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AudioOutput(Strict):
    voice: Any = "default"
    format: Literal["wav", "mp3", "flac", "opus", "pcm16", "aac"]


class StreamOptions(Strict):
    include_usage: StrictBool = False
    include_obfuscation: Literal[False] = False


class FunctionSpec(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None  # nothing holds the model to a schema


class ToolSpec(Strict):
    type: Literal["function"]
    function: FunctionSpec


def _without_none(value: object) -> object:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


TokenLimit = Annotated[WholeNumber, Field(ge=1)]


class ChatRequest(Strict):
    messages: Annotated[list[WireMessage], Field(min_length=1)]
    model: str | None = None
    modalities: Annotated[list[Literal["text", "audio"]], Field(min_length=1)] = ["text"]
    audio: Annotated[AudioOutput | None, BeforeValidator(_without_none)] = None
    stream: StrictBool = False
    stream_options: Annotated[StreamOptions | None, BeforeValidator(_without_none)] = None
    tools: Annotated[list[ToolSpec], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    temperature: Number = 1.0
    top_p: Number = 1.0
    speech_temperature: Number = 1.0  # this server's own
    seed: WholeNumber | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """What is asked for."""

    turn: TurnRequest
    form: str | None  # of the sound; None: text alone
    stream: bool
    include_usage: bool


def parse_chat(
    body: bytes,
    config: ServerConfig,
    talk: TalkConfig,
    memory: AudioMemory,
    unable: Mapping[str, str],
) -> Chat:
    """Decodes the sounds too: not for the event loop. unable: EngineStatus.unsupported."""
    given = json_object(body)
    messages = without_neutral_fields(given.get("messages"))
    left = without_neutral({**given, "messages": messages}, NEUTRAL, BOOKKEEPING)
    try:
        wire = ChatRequest.model_validate(left)
    except ValidationError as exc:
        raise field_refusal(exc) from exc
    check_model(wire.model, config)
    form = _form(wire)
    tools = () if given.get("tool_choice") == "none" else tuple(_tools(wire.tools, config))
    if tools and "tools" in unable:
        message = f"tools={shown(given['tools'])}; {unable['tools']}"
        raise Refused(message, param="tools", code=UNSUPPORTED)
    turn = TurnRequest(
        messages=MessageReader(config, memory, unable.get("tool_calls")).read(wire.messages),
        speech=form is not None,
        tools=tools,
        max_new_tokens=_most_tokens(wire, talk),
        **checked_sampling(wire),
    )
    usage = wire.stream_options is not None and wire.stream_options.include_usage
    return Chat(turn, form, wire.stream, usage)


def _form(wire: ChatRequest) -> str | None:
    if set(wire.modalities) == {"text"}:
        if wire.audio:
            raise Refused(
                'audio is given, but modalities=["text"]; send modalities=["text", "audio"] for '
                "a spoken reply",
                param="modalities",
            )
        return None
    if set(wire.modalities) == {"audio"}:
        raise Refused(
            'modalities=["audio"]; the model speaks what it writes: send ["text", "audio"]',
            param="modalities",
        )
    if wire.audio is None:
        raise Refused("audio is missing; send its voice and format", param="audio")
    if problem := voice_problem(wire.audio.voice):
        raise Refused(f"audio.{problem}", param="audio.voice")
    _check_form(wire.audio.format, streamed=wire.stream)
    return wire.audio.format


def _check_form(form: str, *, streamed: bool) -> None:
    able = [n for n, f in FORMATS.items() if not streamed or (f.in_pieces and n != HEADED)]
    if form not in able:
        when = " while it streams" if streamed else ""
        raise Refused(
            f"audio.format={form!r}; this server can send{when}: {', '.join(able)}",
            param="audio.format",
            code="unsupported_value",
        )


def _most_tokens(wire: ChatRequest, talk: TalkConfig) -> int:
    if len({wire.max_tokens, wire.max_completion_tokens} - {None}) > 1:
        raise Refused(
            f"max_tokens={wire.max_tokens} and max_completion_tokens="
            f"{wire.max_completion_tokens} differ; send one",
            param="max_completion_tokens",
        )
    return wire.max_completion_tokens or wire.max_tokens or talk.reply_tokens


def _tools(specs: list[ToolSpec], config: ServerConfig) -> Iterator[Tool]:
    check_length(sum(len(spec.model_dump_json()) for spec in specs), config.max_text_chars)
    for function in (spec.function for spec in specs):
        yield Tool(function.name, function.description or "", function.parameters or {})
