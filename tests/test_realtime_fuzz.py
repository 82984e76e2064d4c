"""Whatever a client sends, it is taken or refused: nothing else comes out."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from openai.types.realtime import ConversationItem, RealtimeSessionCreateRequest
from pydantic import TypeAdapter

from omnispeech.audio.formats import PCM_24K, PCMU
from omnispeech.server.realtime.items.items import Items, Limits
from omnispeech.server.realtime.items.reading import read_item
from omnispeech.server.realtime.protocol.client_events import KINDS, ClientEvent, parse
from omnispeech.server.realtime.protocol.refusals import ProtocolError, error_event
from omnispeech.server.realtime.settings.session_settings import SessionSettings

SESSION = TypeAdapter(RealtimeSessionCreateRequest)
ITEM = TypeAdapter(ConversationItem)

FIELDS = """
type event_id item item_id id role content text audio transcript input output format rate voice
turn_detection threshold eagerness tools name parameters tool_choice metadata speed truncation
retention_ratio token_limits instructions max_output_tokens output_modalities conversation call_id
arguments status transcription include prompt session response previous_item_id content_index
audio_end_ms description silence_duration_ms idle_timeout_ms create_response temperature modalities
"""
VALUES = """
realtime message function_call function_call_output item_reference user assistant system input_text
input_audio output_text output_audio input_image audio/pcm audio/pcmu auto none required inf
server_vad semantic_vad low function mcp retention_ratio disabled default alloy AAAA {} root
completed a
"""
NAMES, WORDS = st.sampled_from(FIELDS.split()), st.sampled_from(VALUES.split())
PLAIN = st.none() | st.booleans() | st.integers(-5, 30_000) | st.floats() | WORDS | st.text()
JSON = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(), inner),
    max_leaves=12,
)
OBJECTS = st.dictionaries(NAMES, JSON, max_size=6)
KIND = st.sampled_from([*KINDS, "output_audio_buffer.clear", "song.sing"])


def read(text: str) -> ClientEvent | None:
    try:
        return parse(text)
    except ProtocolError as refusal:
        assert len(json.dumps(error_event(refusal))) < 10_000
        return None


@given(fields=OBJECTS, kind=KIND)
def test_an_event_is_taken_or_refused(fields: dict[str, Any], kind: str) -> None:
    event = read(json.dumps(fields | {"type": kind}))
    assert event is None or event.type == kind


@given(text=st.text())
def test_a_frame_is_taken_or_refused(text: str) -> None:
    assert read(text) is None


@given(patches=st.lists(OBJECTS, max_size=3))
def test_a_session_is_whole_after_any_updates(patches: list[dict[str, Any]]) -> None:
    settings = SessionSettings(may_transcribe=True)
    for patch in patches:
        settings, refused = settings.updated(patch)
        assert all(str(refusal.param).startswith("session.") for refusal in refused)
        for refusal in refused:
            json.dumps(error_event(refusal))
    told = settings.described("sess_1", "omnispeech", 0)
    SESSION.validate_python(json.loads(json.dumps(told, allow_nan=False)), strict=True)


@given(wishes=OBJECTS)
def test_a_response_is_whole_whatever_it_asks(wishes: dict[str, Any]) -> None:
    settings, refused = SessionSettings().for_response(wishes)
    assert all(str(refusal.param).startswith("response.") for refusal in refused)
    assert settings.max_new_tokens >= 1 and settings.output_modalities
    json.dumps(settings.described(), allow_nan=False)


@given(wire=st.lists(OBJECTS, max_size=3), kinds=st.lists(WORDS, min_size=3, max_size=3))
def test_an_item_is_whole_or_refused(wire: list[dict[str, Any]], kinds: list[str]) -> None:
    items = Items(Limits(max_audio_s=1.0))
    for fields, kind in zip(wire, kinds, strict=False):
        try:
            items.add(read_item(fields | {"type": kind}, PCMU, 120.0))
        except ProtocolError as refusal:
            assert str(refusal.param).startswith("item")
    for item in items:
        told = items.retrieved(item.id, PCM_24K)
        ITEM.validate_python(json.loads(json.dumps(told)), strict=True)
    items.messages("Be brief.")


@given(given=st.lists(OBJECTS, max_size=2), roles=st.sampled_from(["user", "assistant", "system"]))
def test_a_message_is_whole_or_refused(given: list[dict[str, Any]], roles: str) -> None:
    try:
        item = read_item({"type": "message", "role": roles, "content": given}, PCM_24K, 120.0)
    except ProtocolError as refusal:
        assert str(refusal.param).startswith("item")
        return
    assert item.message() or not item.characters
