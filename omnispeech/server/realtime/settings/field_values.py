"""What single fields of a session may hold."""

from dataclasses import dataclass
from typing import Any, Literal

from omnispeech.audio.formats import PCM_24K, PCMA, PCMU, AudioFormat
from omnispeech.errors import RequestError
from omnispeech.server.realtime.protocol.refusals import ProtocolError
from omnispeech.server.realtime.settings.fields import (
    Check,
    Read,
    Reader,
    checked,
    group,
    leaf,
    number,
    one_of,
    or_null,
    text,
    unsupported,
)
from omnispeech.server.voices import voice_problem

MAX_TOKENS = 4096
MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512  # of metadata
MAX_NAME = 256  # characters of a model's name
# asked of other models; told in the session, and refused with the reason
UNSUPPORTED = {
    "audio.input.noise_reduction": "the sound is taken as it is; send null",
    "audio.output.speed": "the model speaks at its own speed; send 1.0",
    "include": "there are no log probabilities; send null",
    "prompt": "the server keeps no prompts; send instructions",
    "reasoning": "the model answers without reasoning first; send null",
    "tracing": "what is traced is up to the server; send auto or null",
    "truncation.token_limits": "the limit is the context of the model; leave it out",
    "tool_choice": "the model cannot be made to call a tool; send auto or none",
    "tools.mcp": "the server calls no MCP servers; offer a function and call it yourself",
}
OLD_FORMATS = {"pcm16": PCM_24K, "g711_ulaw": PCMU, "g711_alaw": PCMA}  # of the beta

USUALLY_KEPT = 0.8  # by truncation "auto"

Modality = Literal["audio", "text"]


@dataclass(frozen=True, slots=True)
class Truncation:
    """What leaves a conversation that is longer than the context; "disabled": it is refused."""

    kind: Literal["auto", "disabled", "retention_ratio"] = "auto"
    ratio: float = 1.0  # of a retention_ratio

    @property
    def allowed(self) -> bool:
        return self.kind != "disabled"

    @property
    def kept(self) -> float:
        """Share of the room that is filled again when something has to go: where it is all, each
        turn to come drops one more, and nothing that was read can be used again."""
        return self.ratio if self.kind == "retention_ratio" else USUALLY_KEPT

    def described(self) -> Any:
        if self.kind != "retention_ratio":
            return self.kind
        return {"type": self.kind, "retention_ratio": self.ratio}


def modality(value: Any) -> str:
    if value in (None, ["audio"]):
        return "audio"
    if value != ["text"]:
        raise RequestError('allowed: ["audio"], which has its transcript too, and ["text"]')
    return "text"


def old_modality(value: Any) -> str:
    """`modalities`, as before the general release."""
    return "audio" if value in (["audio", "text"], ["text", "audio"]) else modality(value)


def audio_format(value: Any) -> AudioFormat:
    if value is None:
        return PCM_24K
    if isinstance(value, str) and value in OLD_FORMATS:
        return OLD_FORMATS[value]
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise RequestError('send an object such as {"type": "audio/pcm", "rate": 24000}')
    if unknown := sorted(value.keys() - {"type", "rate"}):
        raise ProtocolError(f"{unknown[0]} is not known", code="unknown_parameter")
    rate = value.get("rate")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int)):
        raise RequestError("its rate has to be a whole number")
    usual = PCM_24K.rate if value["type"] == PCM_24K.type else 8000
    return AudioFormat(value["type"], usual if rate is None else rate)


def voice(value: Any) -> None:
    if value is not None and (problem := voice_problem(value)):
        raise RequestError(problem)


def token_limit(value: Any) -> int | None:
    """None: that of the server."""
    if value in (None, "inf"):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TOKENS:
        raise RequestError(f'allowed: 1 to {MAX_TOKENS}, and "inf"')
    return value


def tool_choice(value: Any) -> str:
    if value in ("auto", "none", None):
        return value or "auto"
    if value == "required" or isinstance(value, dict):
        raise ProtocolError(UNSUPPORTED["tool_choice"], code="unsupported")
    raise RequestError("allowed: auto, none")


def truncation(value: Any, place: str) -> Read:
    if not isinstance(value, dict):
        simple: Check = or_null(one_of("auto", "disabled"), "auto")
        return leaf("truncation", lambda given: Truncation(simple(given)))(value, place)
    found = RETENTION(value, place)
    if found.refused and "ratio" not in found.changes:
        return Read(refused=found.refused)
    kept = Truncation("retention_ratio", found.changes.get("ratio", 1.0))
    return Read({"truncation": kept}, found.refused)


RETENTION = group(
    {
        "type": checked(one_of("retention_ratio")),
        "retention_ratio": leaf("ratio", number(0.0, 1.0)),
        "token_limits": checked(unsupported(UNSUPPORTED["truncation.token_limits"])),
    }
)


def transcription(offered: bool) -> Reader:
    """Sets `transcription`; the names of OpenAI's models stand for the one there is."""

    def read(value: Any, place: str) -> Read:
        if value is None or not offered:
            check = unsupported(NO_TRANSCRIPTION)
            return Read({"transcription": False}, leaf("", check)(value, place).refused)
        found = HINTS(value, place)
        return Read({"transcription": True} if isinstance(value, dict) else {}, found.refused)

    return read


NO_TRANSCRIPTION = (
    "this server does not write down what users say (it is started with --transcription model "
    "to do so); send null"
)
NO_HINT = unsupported("what is said is written down without hints; leave it out")
HINTS = group(
    {
        "model": checked(or_null(text(MAX_NAME))),
        **{n: checked(NO_HINT) for n in ("language", "prompt", "delay", "keywords", "languages")},
    }
)


def metadata(value: Any) -> dict[str, str] | None:
    if value is None or value == {}:
        return None
    if not isinstance(value, dict) or len(value) > MAX_PAIRS:
        raise RequestError(f"send an object of at most {MAX_PAIRS} strings")
    for key, item in value.items():
        if len(key) > MAX_KEY or not isinstance(item, str) or len(item) > MAX_VALUE:
            raise RequestError(
                f"allowed: keys of {MAX_KEY} and strings of {MAX_VALUE} characters at most"
            )
    return value
