from typing import Any

import pytest
from openai.types.realtime import RealtimeSessionCreateRequest
from pydantic import TypeAdapter

from omnispeech.audio.formats import PCM_24K, PCMA, PCMU, AudioFormat
from omnispeech.server.realtime.protocol.refusals import ProtocolError
from omnispeech.server.realtime.settings.field_values import Truncation
from omnispeech.server.realtime.settings.session_settings import SessionSettings
from omnispeech.server.realtime.settings.turn_settings import ServerVAD

START = SessionSettings()
NO_PLACE = {"tools": "no place for functions; send no tools", "tool_calls": "no place for calls"}
TOOLLESS = SessionSettings(unable=NO_PLACE)
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "of a town",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
}


def updated(now: SessionSettings = START, **patch: Any) -> SessionSettings:
    settings, refused = now.updated({"type": "realtime", **patch})
    assert not refused, refused
    return settings


def listening(now: SessionSettings = START, **fields: Any) -> SessionSettings:
    return updated(now, audio={"input": fields})


def refusals(now: SessionSettings = START, **patch: Any) -> dict[str, ProtocolError]:
    """By the place; nothing else of the session changes."""
    settings, refused = now.updated({"type": "realtime", **patch})
    assert settings == now
    return {str(refusal.param): refusal for refusal in refused}


def described(settings: SessionSettings = START) -> dict[str, Any]:
    return settings.described("sess_1", "omnispeech", 1_800_000_000)


def test_a_session_is_described_in_full_as_the_sdk_types_it() -> None:
    told = described(updated(tools=[WEATHER], truncation={"type": "retention_ratio"}))
    read = TypeAdapter(RealtimeSessionCreateRequest).validate_python(told, strict=True)
    assert RealtimeSessionCreateRequest.model_fields.keys() <= told.keys()
    assert read.model_dump(exclude_unset=True) == told


def test_a_session_begins_with_turns_that_the_server_finds() -> None:
    session = described()
    assert session["audio"]["input"] == {
        "format": {"type": "audio/pcm", "rate": 24000},
        "noise_reduction": None,
        "transcription": None,
        "turn_detection": {
            "type": "server_vad",
            "threshold": 0.5,
            "prefix_padding_ms": 300,
            "silence_duration_ms": 500,
            "create_response": True,
            "interrupt_response": True,
            "idle_timeout_ms": None,
        },
    }
    assert session["output_modalities"] == ["audio"]
    assert session["max_output_tokens"] == 256


def test_an_update_leaves_what_it_does_not_name() -> None:
    settings = updated(instructions="Be brief.", max_output_tokens=99)
    settings = updated(settings, tools=[WEATHER], tool_choice="none")
    settings = listening(settings, turn_detection={"type": "server_vad", "threshold": 0.7})
    settings = listening(settings, turn_detection={"prefix_padding_ms": 100})
    assert settings.instructions == "Be brief."
    assert settings.max_new_tokens == 99
    (tool,) = settings.tools
    assert (tool.name, tool.description) == ("weather", "of a town")
    assert tool.parameters == WEATHER["parameters"]
    assert settings.turn_detection == ServerVAD(threshold=0.7, prefix_padding_ms=100)
    assert updated(settings) == settings == listening(settings, turn_detection={})


def test_null_clears() -> None:
    settings = updated(instructions="Be brief.", max_output_tokens=9, tools=[WEATHER])
    settings = updated(settings, output_modalities=["text"], truncation="disabled")
    settings = updated(settings, parallel_tool_calls=False, tool_choice="none", temperature=0.3)
    settings = updated(
        settings,
        audio={
            "input": {"format": {"type": "audio/pcmu"}},
            "output": {"format": {"type": "audio/pcma"}},
        },
    )
    names = ("instructions", "max_output_tokens", "tools", "output_modalities", "truncation")
    names += ("parallel_tool_calls", "tool_choice", "temperature", "prompt", "tracing", "include")
    cleared = updated(settings, **dict.fromkeys((*names, "reasoning", "model")))
    cleared = updated(cleared, audio={"input": {"format": None}, "output": {"format": None}})
    assert cleared == START
    assert listening(turn_detection=None).turn_detection is None
    assert updated(settings, tools=[]).tools == ()


@pytest.mark.parametrize(
    ("patch", "param"),
    [
        ({"foo": 1}, "session.foo"),
        ({"audio": {"foo": 1}}, "session.audio.foo"),
        ({"audio": None}, "session.audio"),
        ({"audio": {"input": []}}, "session.audio.input"),
        ({"instructions": 3}, "session.instructions"),
        ({"instructions": "x" * 200_001}, "session.instructions"),
        ({"instructions": "\x01" * 70_000}, "session.instructions"),
        ({"output_modalities": ["audio", "text"]}, "session.output_modalities"),
        ({"output_modalities": "audio"}, "session.output_modalities"),
        ({"max_output_tokens": 0}, "session.max_output_tokens"),
        ({"max_output_tokens": 4097}, "session.max_output_tokens"),
        ({"max_output_tokens": True}, "session.max_output_tokens"),
        ({"max_output_tokens": "many"}, "session.max_output_tokens"),
        ({"temperature": 2.1}, "session.temperature"),
        ({"tools": {}}, "session.tools"),
        ({"tools": [WEATHER] * 129}, "session.tools"),
        ({"tool_choice": "any"}, "session.tool_choice"),
        ({"parallel_tool_calls": 1}, "session.parallel_tool_calls"),
        ({"truncation": "off"}, "session.truncation"),
        ({"truncation": {"retention_ratio": 1.5}}, "session.truncation.retention_ratio"),
        ({"audio": {"input": {"format": {"type": "mp3"}}}}, "session.audio.input.format"),
        (
            {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 44100}}}},
            "session.audio.input.format",
        ),
        ({"audio": {"output": {"voice": "bob"}}}, "session.audio.output.voice"),
        ({"audio": {"output": {"voice": {"id": "voice_7"}}}}, "session.audio.output.voice"),
        (
            {"audio": {"input": {"turn_detection": {"type": "magic"}}}},
            "session.audio.input.turn_detection.type",
        ),
        ({"audio": {"input": {"turn_detection": 3}}}, "session.audio.input.turn_detection"),
    ],
)
def test_what_is_wrong_is_refused_at_its_place(patch: dict[str, Any], param: str) -> None:
    assert refusals(**patch).keys() == {param}


@pytest.mark.parametrize(
    ("patch", "param"),
    [
        ({"prompt": {"id": "p"}}, "session.prompt"),
        ({"reasoning": {"effort": "low"}}, "session.reasoning"),
        ({"tracing": {"group_id": "g"}}, "session.tracing"),
        ({"include": ["item.input_audio_transcription.logprobs"]}, "session.include"),
        ({"tool_choice": "required"}, "session.tool_choice"),
        ({"tool_choice": {"type": "function", "name": "weather"}}, "session.tool_choice"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "session.tools[0]"),
        (
            {"audio": {"input": {"noise_reduction": {"type": "near_field"}}}},
            "session.audio.input.noise_reduction",
        ),
        (
            {"audio": {"input": {"transcription": {"model": "whisper-1"}}}},
            "session.audio.input.transcription",
        ),
        ({"audio": {"output": {"speed": 1.25}}}, "session.audio.output.speed"),
        (
            {"truncation": {"type": "retention_ratio", "token_limits": {"post_instructions": 1}}},
            "session.truncation.token_limits",
        ),
    ],
)
def test_what_the_model_cannot_do_is_said_in_the_session_and_refused(
    patch: dict[str, Any], param: str
) -> None:
    settings, refused = START.updated({"type": "realtime", **patch})
    assert [(refusal.param, refusal.code) for refusal in refused] == [(param, "unsupported")]
    place = param.removeprefix("session.").replace("[0]", ".mcp")
    assert place in described(settings)["unsupported"]


def test_what_asks_for_nothing_is_taken() -> None:
    nothing = {"noise_reduction": None, "transcription": None}
    assert listening(**nothing) == START
    assert updated(include=[], tracing=None, prompt=None, reasoning={}) == START
    assert updated(audio={"output": {"speed": 1.0}}) == START
    assert updated(audio={"output": {"speed": 1}}, model="gpt-realtime") == START


def test_all_but_the_refused_is_applied() -> None:
    patch = {
        "instructions": "Be brief.",
        "foo": 1,
        "tools": [WEATHER, {"type": "mcp"}, WEATHER, {"type": "function", "name": "a b"}],
        "audio": {
            "input": {
                "transcription": {"model": "whisper-1"},
                "turn_detection": {"type": "server_vad", "threshold": 2, "prefix_padding_ms": 40},
            },
            "output": {"voice": "marin", "speed": 2},
        },
    }
    settings, refused = START.updated(patch)
    assert settings.instructions == "Be brief."
    assert [tool.name for tool in settings.tools] == ["weather"]
    assert settings.turn_detection == ServerVAD(prefix_padding_ms=40)
    assert [refusal.param for refusal in refused] == [
        "session.foo",
        "session.tools[1]",
        "session.tools[2]",
        "session.tools[3]",
        "session.audio.input.transcription",
        "session.audio.input.turn_detection.threshold",
        "session.audio.output.speed",
    ]


def test_a_session_of_transcription_alone_is_refused_as_a_whole() -> None:
    settings, refused = START.updated({"type": "transcription", "instructions": "x"})
    assert settings == START
    assert [(r.param, r.code) for r in refused] == [("session.type", "unsupported")]


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("threshold", (-0.1, 1.1, "0.5", True, float("nan"))),
        ("prefix_padding_ms", (-1, 5001, 1.5, True)),
        ("silence_duration_ms", (99, 10_001)),
        ("create_response", ("yes", 1)),
        ("interrupt_response", (0,)),
        ("idle_timeout_ms", (4999, 30_001, 0)),
        ("eagerness", ("low",)),
    ],
)
def test_turn_detection_has_its_ranges(field: str, wrong: tuple[Any, ...]) -> None:
    for value in wrong:
        patch = {"input": {"turn_detection": {"type": "server_vad", field: value}}}
        assert refusals(audio=patch).keys() == {f"session.audio.input.turn_detection.{field}"}


def test_turn_detection_of_sentences_becomes_a_longer_silence() -> None:
    silences = {}
    for eagerness in ("low", "medium", "high", "auto", None):
        wish = {"type": "semantic_vad", "eagerness": eagerness, "interrupt_response": False}
        vad = described(listening(turn_detection=wish))["audio"]["input"]["turn_detection"]
        assert (vad["type"], vad["interrupt_response"]) == ("server_vad", False)
        silences[eagerness] = vad["silence_duration_ms"]
    assert silences == {"low": 1200, "medium": 800, "high": 500, "auto": 800, None: 800}


def test_each_kind_of_turn_detection_begins_with_its_own_values() -> None:
    settings = listening(turn_detection={"type": "semantic_vad", "eagerness": "low"})
    kept = listening(settings, turn_detection={"create_response": False})
    assert kept.turn_detection and kept.turn_detection.silence_duration_ms == 1200
    assert not kept.turn_detection.create_response
    assert listening(settings, turn_detection={"type": "server_vad"}).turn_detection == ServerVAD()


def test_turn_detection_that_is_off_needs_its_type_to_come_back() -> None:
    off = listening(turn_detection=None)
    wish = {"input": {"turn_detection": {"threshold": 0.4}}}
    (refusal,) = refusals(off, audio=wish).values()
    assert refusal.param == "session.audio.input.turn_detection.type"
    assert refusal.code == "missing_required_parameter"
    again = listening(off, turn_detection={"type": "server_vad", "threshold": 0.4})
    assert again.turn_detection == ServerVAD(threshold=0.4)


@pytest.mark.parametrize(
    ("wire", "form"),
    [
        ({"type": "audio/pcm", "rate": 24000}, PCM_24K),
        ({"type": "audio/pcm"}, PCM_24K),
        ({"type": "audio/pcm", "rate": 16000}, AudioFormat("audio/pcm", 16000)),
        ({"type": "audio/pcmu"}, PCMU),
        ({"type": "audio/pcma", "rate": None}, PCMA),
        ("g711_ulaw", PCMU),
    ],
)
def test_formats_of_both_ways(wire: Any, form: AudioFormat) -> None:
    settings = updated(audio={"input": {"format": wire}, "output": {"format": wire}})
    assert (settings.input_format, settings.output_format) == (form, form)
    assert described(settings)["audio"]["output"]["format"]["type"] == form.type


def test_flat_fields_of_the_beta_are_taken() -> None:
    settings = updated(
        modalities=["text", "audio"],
        voice="alloy",
        input_audio_format="pcm16",
        output_audio_format="g711_alaw",
        turn_detection=None,
        input_audio_transcription=None,
        max_response_output_tokens="inf",
        temperature=0.8,
    )
    assert settings.speech and settings.turn_detection is None
    assert settings.output_format == PCMA
    assert settings.temperature == 0.8


def test_no_limit_is_that_of_the_server() -> None:
    server = SessionSettings(reply_tokens=77)
    assert updated(server, max_output_tokens=5).max_new_tokens == 5
    assert updated(server, max_output_tokens="inf").max_new_tokens == 77
    assert described(server)["max_output_tokens"] == 77


def test_truncation_is_read_and_told_back() -> None:
    wish = {"type": "retention_ratio", "retention_ratio": 0.8}
    settings = updated(truncation=wish)
    assert settings.truncation == Truncation("retention_ratio", 0.8)
    assert described(settings)["truncation"] == wish
    assert described(updated(truncation="disabled"))["truncation"] == "disabled"


def test_the_tools_may_not_be_longer_than_a_text() -> None:
    server = SessionSettings(max_text_chars=1000)
    long = WEATHER | {"name": "long", "description": "x" * 800}
    settings, refused = server.updated({"tools": [WEATHER, long]})
    assert [tool.name for tool in settings.tools] == ["weather"]
    assert "1000" in str(refused[0])


@pytest.mark.parametrize(
    ("tool", "word"),
    [
        ("weather", "object"),
        ({"type": "web_search"}, "function"),
        ({"type": "function"}, "name"),
        (WEATHER | {"name": ""}, "name"),
        (WEATHER | {"name": 3}, "name"),
        (WEATHER | {"description": 3}, "description"),
        (WEATHER | {"parameters": "{}"}, "parameters"),
        (WEATHER | {"strict": True}, "strict"),
    ],
)
def test_a_wrong_tool_is_refused_with_the_reason(tool: Any, word: str) -> None:
    (refusal,) = refusals(tools=[tool]).values()
    assert refusal.param == "session.tools[0]"
    assert word in str(refusal)


def test_tools_are_refused_as_a_whole_where_the_model_has_no_place_for_them() -> None:
    for tools in ([WEATHER], [WEATHER] * 2, [{"type": "mcp"}]):
        settings, refused = TOOLLESS.updated({"tools": tools, "instructions": "Be brief."})
        assert [(r.param, r.code) for r in refused] == [("session.tools", "unsupported")]
        assert str(refused[0]).endswith(NO_PLACE["tools"])
        assert (settings.tools, settings.instructions) == ((), "Be brief.")
    _, refused = TOOLLESS.for_response({"tools": [WEATHER], "tool_choice": "none"})
    assert [(r.param, r.code) for r in refused] == [("response.tools", "unsupported")]


@pytest.mark.parametrize("tools", [[], None])
@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_a_client_without_tools_hears_nothing_of_them(tools: Any, choice: Any) -> None:
    settings = updated(TOOLLESS, tools=tools, tool_choice=choice, parallel_tool_calls=True)
    response, refused = settings.for_response({"tools": tools, "tool_choice": choice})
    assert (response.tools, refused) == ((), [])


def test_the_session_tells_that_the_model_has_no_place_for_tools() -> None:
    told = described(TOOLLESS)["unsupported"]
    assert told["tools"] == NO_PLACE["tools"]
    assert told["item.function_call"] == NO_PLACE["tool_calls"]
    assert not {"tools", "item.function_call"} & described()["unsupported"].keys()


def test_transcription_is_on_where_the_server_offers_it() -> None:
    server = SessionSettings(may_transcribe=True)
    settings = listening(server, transcription={"model": "gpt-4o-mini-transcribe"})
    assert settings.transcription
    assert described(settings)["audio"]["input"]["transcription"] == {"model": "omnispeech"}
    assert "audio.input.transcription" not in described(settings)["unsupported"]
    assert not listening(settings, transcription=None).transcription
    hinted, refused = server.updated({"input_audio_transcription": {"language": "en"}})
    assert hinted.transcription
    assert [r.param for r in refused] == ["session.input_audio_transcription.language"]


def test_a_response_has_what_the_session_has_and_its_own_wishes() -> None:
    session = updated(instructions="Be brief.", tools=[WEATHER], max_output_tokens=50)
    assert session.for_turn().instructions == "Be brief."
    assert session.for_turn().tools == session.tools
    response, refused = session.for_response(
        {
            "conversation": "none",
            "instructions": "Sing.",
            "output_modalities": ["text"],
            "tool_choice": "none",
            "max_output_tokens": 7,
            "metadata": {"topic": "song"},
            "input": [{"type": "item_reference", "id": "item_1"}],
            "audio": {"output": {"format": {"type": "audio/pcmu"}, "voice": "cedar"}},
        }
    )
    assert not refused
    assert (response.out_of_band, response.instructions, response.speech) == (True, "Sing.", False)
    assert (response.max_new_tokens, response.tools) == (7, ())
    assert response.input == ({"type": "item_reference", "id": "item_1"},)
    assert response.described() == {
        "output_modalities": ["text"],
        "max_output_tokens": 7,
        "audio": {"output": {"format": {"type": "audio/pcmu"}, "voice": "default"}},
        "metadata": {"topic": "song"},
    }
    assert session.for_turn().max_new_tokens == 50


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"conversation": "conv_1"}, "response.conversation"),
        ({"input": {}}, "response.input"),
        ({"input": ["text"]}, "response.input"),
        ({"metadata": {"a": 1}}, "response.metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "response.metadata"),
        ({"metadata": {"a": "x" * 513}}, "response.metadata"),
        ({"metadata": {"x" * 65: ""}}, "response.metadata"),
        ({"metadata": []}, "response.metadata"),
        ({"prompt": {"id": "p"}}, "response.prompt"),
        ({"tool_choice": "required"}, "response.tool_choice"),
        ({"audio": {"input": {}}}, "response.audio.input"),
        ({"truncation": "auto"}, "response.truncation"),
        ({"tools": [{"type": "mcp"}]}, "response.tools[0]"),
    ],
)
def test_a_wrong_wish_of_a_response_is_named(fields: dict[str, Any], param: str) -> None:
    _, refused = START.for_response(fields)
    assert [refusal.param for refusal in refused] == [param]


def test_null_in_a_response_leaves_what_the_session_says() -> None:
    session = updated(instructions="Be brief.", tools=[WEATHER], max_output_tokens=50)
    names = ("instructions", "tools", "tool_choice", "max_output_tokens", "metadata", "input")
    response, refused = session.for_response(dict.fromkeys(names))
    assert (response, refused) == (session.for_turn(), [])


def test_what_is_traced_is_left_to_the_server() -> None:
    assert updated(tracing="auto") == START
