import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from openai.types.realtime import RealtimeClientEvent

from omnispeech.errors import (
    GenerationError,
    NotReady,
    OmniSpeechError,
    PromptTooLong,
    TooManyRequests,
)
from omnispeech.server.realtime.protocol.client_events import (
    CODES,
    KINDS,
    WEBRTC_ONLY,
    AppendAudio,
    CreateResponse,
    TruncateItem,
    parse,
)
from omnispeech.server.realtime.protocol.refusals import KINDS as ERRORS
from omnispeech.server.realtime.protocol.refusals import (
    ProtocolError,
    buffer_empty,
    error_event,
    response_error,
    response_not_found,
)

ROOT = Path(__file__).parent.parent


def refusal(**fields: Any) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        parse(json.dumps(fields))
    return caught.value


def test_every_client_event_of_the_sdk_is_known() -> None:
    (union, _) = get_args(RealtimeClientEvent)
    known = {get_args(kind.model_fields["type"].annotation)[0] for kind in get_args(union)}
    assert known == {*KINDS, *WEBRTC_ONLY}


@pytest.mark.parametrize(
    "event",
    [
        {"type": "session.update", "session": {"type": "realtime"}},
        {"type": "input_audio_buffer.append", "audio": ""},
        {"type": "input_audio_buffer.commit"},
        {"type": "input_audio_buffer.clear"},
        {"type": "conversation.item.create", "item": {}, "previous_item_id": "root"},
        {"type": "conversation.item.retrieve", "item_id": "a"},
        {"type": "conversation.item.delete", "item_id": "a"},
        {"type": "conversation.item.truncate", "item_id": "a", "content_index": 0}
        | {"audio_end_ms": 0},
        {"type": "response.create"},
        {"type": "response.cancel"},
    ],
    ids=lambda event: event["type"],
)
def test_an_event_is_taken_with_and_without_an_id(event: dict[str, Any]) -> None:
    assert parse(json.dumps(event)).event_id is None
    assert parse(json.dumps(event | {"event_id": "e1"})).event_id == "e1"
    assert type(parse(json.dumps(event | {"event_id": None}))) is KINDS[event["type"]]


def test_sound_is_decoded() -> None:
    event = parse('{"type": "input_audio_buffer.append", "audio": "AAEC"}')
    assert isinstance(event, AppendAudio) and event.audio == b"\x00\x01\x02"


def test_a_response_without_wishes_is_an_empty_one() -> None:
    event = parse('{"type": "response.create", "response": null}')
    assert isinstance(event, CreateResponse) and event.response == {}


def test_a_negative_end_is_for_the_conversation_to_clamp() -> None:
    fields = {"type": "conversation.item.truncate", "item_id": "a", "content_index": 0}
    event = parse(json.dumps(fields | {"audio_end_ms": -20}))
    assert isinstance(event, TruncateItem) and event.audio_end_ms == -20


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "invalid_json"),
        ("{", "invalid_json"),
        ('{"type": NaN}', "invalid_json"),
        ("[" * 100_000, "invalid_json"),
        ('{"type": "\\ud800"}', "invalid_json"),
        ("[]", "invalid_event"),
        ('"session.update"', "invalid_event"),
        ("{}", "missing_required_parameter"),
        ('{"type": 1}', "unknown_event"),
        ('{"type": "response.audio.delta"}', "unknown_event"),
        ('{"type": "output_audio_buffer.clear"}', "unsupported"),
    ],
)
def test_a_frame_that_is_no_event_is_refused(text: str, code: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse(text)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"type": "session.update"}, "session", "missing_required_parameter"),
        ({"type": "session.update", "session": []}, "session", "invalid_value"),
        ({"type": "input_audio_buffer.append"}, "audio", "missing_required_parameter"),
        ({"type": "input_audio_buffer.append", "audio": "A"}, "audio", "invalid_value"),
        ({"type": "input_audio_buffer.append", "audio": "AA A="}, "audio", "invalid_value"),
        ({"type": "input_audio_buffer.append", "audio": 3}, "audio", "invalid_value"),
        ({"type": "conversation.item.create"}, "item", "missing_required_parameter"),
        ({"type": "conversation.item.delete", "item_id": 7}, "item_id", "invalid_value"),
        ({"type": "conversation.item.delete", "item_id": ""}, "item_id", "invalid_value"),
        ({"type": "response.cancel", "response_id": {}}, "response_id", "invalid_value"),
        ({"type": "response.cancel", "foo": 1}, "foo", "unknown_parameter"),
        ({"type": "response.create", "response": []}, "response", "invalid_value"),
        ({"type": "response.create", "response": [1]}, "response", "invalid_value"),
    ],
)
def test_a_wrong_field_is_named_with_the_event(
    fields: dict[str, Any], param: str, code: str
) -> None:
    told = error_event(refusal(**fields, event_id="mine"))["error"]
    assert (told["param"], told["code"], told["event_id"]) == (param, code, "mine")
    assert told["type"] == "invalid_request_error"
    assert param in told["message"]


def test_a_long_value_is_not_sent_back() -> None:
    told = error_event(refusal(type="input_audio_buffer.append", audio="?" * 10_000))
    assert len(told["error"]["message"]) < 200


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "x" * 10_000},
        {"type": "response.cancel", "x" * 10_000: 1},
        {"type": "response.cancel", "event_id": "x" * 10_000},
        {"type": "response.create", "response": ["x" * 10_000] * 9},
    ],
)
def test_a_refusal_is_short_whatever_was_sent(fields: dict[str, Any]) -> None:
    assert len(json.dumps(error_event(refusal(**fields)))) < 3000


def test_an_event_id_that_is_none_is_refused_and_not_sent_back() -> None:
    refused = refusal(type="response.cancel", event_id=5)
    assert (refused.param, refused.event_id) == ("event_id", None)


def test_every_code_is_explained() -> None:
    page = (ROOT / "docs/realtime.md").read_text(encoding="utf-8")
    files = (ROOT / "omnispeech/server/realtime").rglob("*.py")
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    codes = {*re.findall(r'code="(\w+)"', source), *CODES.values()}
    codes |= {code for kind, _, code in ERRORS if kind is not OmniSpeechError}
    assert len(codes) > 20
    assert [code for code in codes if f"`{code}`" not in page] == []


def test_an_error_names_the_event_it_is_about() -> None:
    assert error_event(buffer_empty(20.0), "mine") == {
        "type": "error",
        "error": {
            "type": "invalid_request_error",
            "code": "input_audio_buffer_commit_empty",
            "message": "the input audio buffer holds 20 ms of sound; append 100 ms or more, "
            "then commit",
            "param": None,
            "event_id": "mine",
        },
    }
    assert error_event(response_not_found("resp_1"))["error"]["param"] == "response_id"


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (PromptTooLong("long", 9, 8), "invalid_request_error", "context_length_exceeded"),
        (TooManyRequests("much", 3), "rate_limit_error", "rate_limit_exceeded"),
        (NotReady("loading"), "server_error", "server_not_ready"),
        (GenerationError("broken"), "server_error", "generation_failed"),
        (buffer_empty(0), "invalid_request_error", "input_audio_buffer_commit_empty"),
    ],
)
def test_errors_of_the_server_have_a_type_and_a_code(
    error: Exception, kind: str, code: str
) -> None:
    assert response_error(error) == {"type": kind, "code": code, "message": str(error)}
    assert error_event(error)["error"]["code"] == code
