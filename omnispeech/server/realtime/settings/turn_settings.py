"""How the end of a turn is found: `turn_detection` of a session."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from omnispeech.server.realtime.protocol.client_events import shown
from omnispeech.server.realtime.protocol.refusals import ProtocolError
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
    whole_number,
)

# semantic_vad: there is no model of sentences here; the server waits as long as it would
SILENCE_MS = {"low": 1200, "medium": 800, "auto": 800, "high": 500}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerVAD:
    """The end of speech is found in its sound."""

    threshold: float = 0.5  # probability of speech, 0 to 1
    prefix_padding_ms: int = 300  # sound kept from before the speech
    silence_duration_ms: int = 500  # that ends the turn
    create_response: bool = True  # at the end of a turn
    interrupt_response: bool = True  # at the begin of speech
    idle_timeout_ms: int | None = None  # silence after which the model speaks by itself

    eagerness: str | None = None  # of a semantic_vad, which silence_duration_ms stands for

    @property
    def kind(self) -> str:
        return "semantic_vad" if self.eagerness else "server_vad"

    def described(self) -> dict[str, Any]:
        """What is in effect, whatever it was called when it was asked for."""
        fields = asdict(self)
        del fields["eagerness"]
        return {"type": "server_vad"} | fields


DEFAULT = ServerVAD()
STARTS = {"server_vad": DEFAULT, "semantic_vad": ServerVAD(eagerness="auto")}
KIND: Reader = checked(one_of("server_vad", "semantic_vad"))
REPLYING: dict[str, Reader] = {
    "create_response": leaf("create_response", or_null(flag, True)),
    "interrupt_response": leaf("interrupt_response", or_null(flag, True)),
}
SERVER_VAD = group(
    {
        "type": KIND,
        "threshold": leaf("threshold", or_null(number(0.0, 1.0), DEFAULT.threshold)),
        "prefix_padding_ms": leaf(
            "prefix_padding_ms", or_null(whole_number(0, 5000), DEFAULT.prefix_padding_ms)
        ),
        "silence_duration_ms": leaf(
            "silence_duration_ms", or_null(whole_number(100, 10_000), DEFAULT.silence_duration_ms)
        ),
        **REPLYING,
        "idle_timeout_ms": leaf("idle_timeout_ms", or_null(whole_number(5000, 30_000))),
    }
)
SEMANTIC_VAD = group(
    {"type": KIND, "eagerness": leaf("eagerness", or_null(one_of(*SILENCE_MS), "auto")), **REPLYING}
)


def turn_detection(now: ServerVAD | None) -> Reader:
    """null: turns are committed by the client. Else what is not named stays as it is `now`."""

    def read(value: Any, place: str) -> Read:
        if value is None:
            return Read({"turn_detection": None})
        if not isinstance(value, dict):
            return SERVER_VAD(value, place)
        kind = value.get("type", now and now.kind)
        if kind is None:
            return Read(refused=[_no_kind(value, place)])
        found = (SEMANTIC_VAD if kind == "semantic_vad" else SERVER_VAD)(value, place)
        if any(refusal.param == f"{place}.type" for refusal in found.refused):
            return Read(refused=found.refused)
        base = now if now is not None and now.kind == kind else STARTS[kind]
        return Read({"turn_detection": _timed(replace(base, **found.changes))}, found.refused)

    return read


def _timed(vad: ServerVAD) -> ServerVAD:
    if vad.eagerness is None:
        return vad
    return replace(vad, silence_duration_ms=SILENCE_MS[vad.eagerness])


def _no_kind(value: Any, place: str) -> ProtocolError:
    return ProtocolError(
        f"{place}={shown(value)} has no type; known: server_vad, semantic_vad",
        code="missing_required_parameter",
        param=f"{place}.type",
    )
