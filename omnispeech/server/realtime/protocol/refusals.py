"""What is refused in a live conversation, as `error` events. None of them ends it."""

from typing import Any

from omnispeech.errors import (
    GenerationError,
    NotReady,
    OmniSpeechError,
    Overloaded,
    PromptTooLong,
    RequestError,
    TooManyRequests,
    Unavailable,
    Unsupported,
)

INVALID = "invalid_request_error"
# the class of an error -> its type and code on the wire; the first that fits
KINDS: tuple[tuple[type[OmniSpeechError], str, str], ...] = (
    (PromptTooLong, INVALID, "context_length_exceeded"),
    (Unsupported, INVALID, "unsupported"),
    (RequestError, INVALID, "invalid_value"),
    (TooManyRequests, "rate_limit_error", "rate_limit_exceeded"),
    (Overloaded, "server_error", "server_overloaded"),
    (NotReady, "server_error", "server_not_ready"),
    (Unavailable, "server_error", "server_unavailable"),
    (GenerationError, "server_error", "generation_failed"),
    (OmniSpeechError, "server_error", "server_error"),
)


LONGEST = 1000  # characters of what is told: clients may have chosen them


class ProtocolError(RequestError):
    """`param`: the place in the client's event, by dots; `event_id`: of that event."""

    type = INVALID

    def __init__(
        self,
        message: str,
        *,
        code: str = "invalid_value",
        param: str | None = None,
        event_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.event_id = event_id

    def of_event(self, event_id: str | None) -> "ProtocolError":
        """The same, told of another event."""
        return ProtocolError(str(self), code=self.code, param=self.param, event_id=event_id)


def response_error(exc: OmniSpeechError) -> dict[str, str]:
    """For the status_details of a response that failed."""
    message = str(exc)[:LONGEST]
    if isinstance(exc, ProtocolError):
        return {"type": exc.type, "code": exc.code, "message": message}
    kind, code = next((kind, code) for known, kind, code in KINDS if isinstance(exc, known))
    return {"type": kind, "code": code, "message": message}


def error_event(exc: OmniSpeechError, event_id: str | None = None) -> dict[str, Any]:
    """`event_id`: of the client's event, where the error does not say it."""
    told = exc if isinstance(exc, ProtocolError) else ProtocolError(str(exc))
    place = {"param": told.param and told.param[:LONGEST], "event_id": told.event_id or event_id}
    return {"type": "error", "error": response_error(exc) | place}


def buffer_empty(held_ms: float) -> ProtocolError:
    return ProtocolError(
        f"the input audio buffer holds {held_ms:.0f} ms of sound; append 100 ms or more, "
        "then commit",
        code="input_audio_buffer_commit_empty",
    )


def cancel_not_active() -> ProtocolError:
    """The first two words are OpenAI's: LiveKit's client knows by them that nothing is wrong."""
    return ProtocolError(
        "Cancellation failed: no response is active", code="response_cancel_not_active"
    )


def response_not_found(response_id: str) -> ProtocolError:
    return ProtocolError(
        f"Cancellation failed: response_id={response_id!r} is not active; leave it out to cancel "
        "the one that is",
        code="response_cancel_not_active",
        param="response_id",
    )


def response_active(response_id: str) -> ProtocolError:
    return ProtocolError(
        f"the response {response_id} is active; wait for its response.done or cancel it",
        code="conversation_already_has_active_response",
    )


def nothing_to_answer() -> ProtocolError:
    return ProtocolError(
        "the conversation is empty; add an item or commit sound, then create a response",
        code="conversation_empty",
    )


def nothing_in_input() -> ProtocolError:
    return ProtocolError(
        "response.input is empty, and there are no instructions; send one of them, or leave input "
        "out to answer the conversation",
        code="conversation_empty",
        param="response.input",
    )


def binary_frame() -> ProtocolError:
    return ProtocolError(
        "a frame is binary; send each event as JSON in a text frame", code="invalid_event"
    )
