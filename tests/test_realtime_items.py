import base64
from typing import Any

import numpy as np
import pytest
from openai.types.realtime import ConversationItem
from pydantic import TypeAdapter

from omnispeech.audio.formats import PCM_24K, PCMU, AudioFormat
from omnispeech.audio.io import samples_from_pcm16
from omnispeech.config import ServerConfig, TalkConfig
from omnispeech.engine.events import Audio, Message, Text
from omnispeech.errors import PromptTooLong
from omnispeech.server.realtime.items.items import Items, Limits
from omnispeech.server.realtime.items.kinds import (
    AssistantMessage,
    FunctionCall,
    FunctionOutput,
    Item,
    MessageItem,
    Spoken,
    Written,
    user_sound,
)
from omnispeech.server.realtime.items.reading import read_item
from omnispeech.server.realtime.protocol.refusals import ProtocolError
from omnispeech.server.realtime.settings.field_values import Truncation

LIMITS = Limits()
ITEM = TypeAdapter(ConversationItem)
AUTO, DISABLED = Truncation(), Truncation("disabled")
LEAST = Truncation("retention_ratio", 1.0)


def tone(seconds: float, rate_hz: int = 16_000) -> np.ndarray:
    times = np.arange(int(seconds * rate_hz)) / rate_hz
    return (0.5 * np.sin(2 * np.pi * 300 * times)).astype(np.float32)


def in_base64(seconds: float, form: AudioFormat = PCM_24K) -> str:
    return base64.b64encode(form.encode(tone(seconds, form.rate))).decode()


def read(form: AudioFormat = PCM_24K, max_audio_s: float = 120.0, **wire: Any) -> Item:
    return read_item(wire, form, max_audio_s)


def message(role: str, *content: dict[str, Any], **fields: Any) -> Item:
    return read(type="message", role=role, content=list(content), **fields)


def said(text: str, item_id: str | None = None) -> Item:
    return message("user", {"type": "input_text", "text": text}, id=item_id)


def reply(text: str, item_id: str, ms: float = 1000.0, status: str = "completed") -> Item:
    item = AssistantMessage(item_id)
    item.spoken.add_text(text, 0.0)
    item.spoken.add_audio(ms)
    item.spoken.finish()
    item.status = status
    return item


def conversation(*items: Item, limits: Limits = LIMITS) -> Items:
    whole = Items(limits)
    for item in items:
        whole.add(item)
    return whole


def ids(items: Items) -> list[str]:
    return [item.id for item in items]


def plain(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    """Sound is a star."""
    return [
        (m.role, "".join(part.text if isinstance(part, Text) else "*" for part in m.content))
        for m in messages
    ]


def refused(**wire: Any) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        read(**wire)
    return caught.value


def part_refused(role: str, **part: Any) -> ProtocolError:
    return refused(type="message", role=role, content=[part])


@pytest.mark.parametrize(
    "wire",
    [
        {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_audio", "transcript": "a"}],
        },
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c", "output": ""},
    ],
)
def test_an_item_is_told_as_it_was_given(wire: dict[str, Any]) -> None:
    told = read(**wire, id="mine").described()
    assert told == wire | {"id": "mine", "object": "realtime.item", "status": "completed"}
    ITEM.validate_python(told, strict=True)


def test_an_item_without_an_id_gets_one() -> None:
    first, second = said("a"), said("a")
    assert first.id.startswith("item_") and first.id != second.id
    call = read(type="function_call", name="f", arguments="{}")
    assert call.described()["call_id"].startswith("call_")


@pytest.mark.parametrize("form", [PCM_24K, PCMU, AudioFormat("audio/pcm", 16_000)])
def test_sound_comes_in_and_goes_back_in_the_format_of_the_session(form: AudioFormat) -> None:
    wire = {"type": "input_audio", "audio": in_base64(0.5, form), "transcript": "la"}
    item = read(form, type="message", role="user", content=[wire], id="a")
    items = conversation(item)
    (heard,) = items.messages("")[0].content
    assert isinstance(heard, Audio)
    assert len(heard.samples) == 8000
    np.testing.assert_allclose(heard.samples[800:-800], tone(0.5)[800:-800], atol=0.03)
    told = items.retrieved("a", form)
    ITEM.validate_python(told, strict=True)
    (content,) = told["content"]
    assert content["transcript"] == "la"
    back = form.decode(base64.b64decode(content["audio"]))
    assert len(back) == form.rate // 2
    edge = form.rate // 20
    np.testing.assert_allclose(back[edge:-edge], tone(0.5, form.rate)[edge:-edge], atol=0.03)


def test_sound_is_kept_in_16_bits_and_read_the_same_each_time() -> None:
    item = user_sound(tone(1) / 3)
    (part,) = item.parts
    assert isinstance(part, Spoken) and len(part.pcm) == 32_000
    first, again = (item.message().content[0].samples for _ in range(2))
    np.testing.assert_array_equal(first, samples_from_pcm16(part.pcm))
    assert first.tobytes() == again.tobytes()
    np.testing.assert_allclose(first, tone(1) / 3, atol=2**-16)


def test_sound_is_not_told_but_on_request() -> None:
    items = conversation(user_sound(tone(0.5), "a"), reply("Hello.", "b"))
    assert items.get("a").described()["content"] == [{"type": "input_audio", "transcript": None}]
    assert items.retrieved("b", PCM_24K)["content"] == [
        {"type": "output_audio", "transcript": "Hello."}
    ]


def test_sound_too_long_for_a_frame_is_not_sent() -> None:
    items = conversation(user_sound(tone(20), "a"))
    with pytest.raises(ProtocolError, match="20 s of sound") as caught:
        items.retrieved("a", PCM_24K)
    assert caught.value.code == "item_too_large"
    assert items.retrieved("a", PCMU)["content"][0]["audio"]


@pytest.mark.parametrize(
    ("wire", "param"),
    [
        ({}, "item.type"),
        ({"type": "song"}, "item.type"),
        ({"type": []}, "item.type"),
        ({"type": "item_reference", "id": "a"}, "item.type"),
        ({"type": "message", "role": "user"}, "item.content"),
        ({"type": "message", "role": "user", "content": []}, "item.content"),
        ({"type": "message", "role": "user", "content": "hi"}, "item.content"),
        ({"type": "message", "role": "user", "content": ["hi"]}, "item.content[0]"),
        ({"type": "message", "role": "tool", "content": [{}]}, "item.role"),
        ({"type": "message", "role": "user", "content": [{}], "name": "x"}, "item.name"),
        ({"type": "message", "role": "user", "content": [{}], "id": ""}, "item.id"),
        ({"type": "message", "role": "user", "content": [{}], "status": "x"}, "item.status"),
        ({"type": "function_call", "name": "f"}, "item.arguments"),
        ({"type": "function_call", "name": "f", "arguments": "x"}, "item.arguments"),
        ({"type": "function_call", "name": "f", "arguments": "[]"}, "item.arguments"),
        ({"type": "function_call", "name": "", "arguments": "{}"}, "item.name"),
        ({"type": "function_call_output", "output": ""}, "item.call_id"),
        ({"type": "function_call_output", "call_id": "c", "output": {}}, "item.output"),
    ],
)
def test_a_wrong_item_is_refused_at_its_place(wire: dict[str, Any], param: str) -> None:
    assert refused(**wire).param == param


@pytest.mark.parametrize(
    ("role", "part", "param"),
    [
        ("user", {"type": "input_text"}, "text"),
        ("user", {"type": "input_text", "text": 3}, "text"),
        ("user", {"type": "input_text", "text": "a", "audio": "AAAA"}, "audio"),
        ("user", {"type": "input_text", "text": "a", "detail": "low"}, "detail"),
        ("user", {"type": "output_text", "text": "a"}, "type"),
        ("user", {"type": "input_audio"}, "audio"),
        ("user", {"type": "input_audio", "audio": ""}, "audio"),
        ("user", {"type": "input_audio", "audio": "AAA="}, None),
        ("user", {"type": "input_audio", "audio": "AAAA"}, "audio"),
        ("user", {"type": "input_audio", "audio": "?"}, "audio"),
        ("user", {"type": "input_audio", "audio": "AAA=", "text": "a"}, "text"),
        ("system", {"type": "input_audio", "audio": "AAA="}, "type"),
        ("assistant", {"type": "input_text", "text": "a"}, "type"),
        ("assistant", {"type": "output_audio"}, "transcript"),
        ("assistant", {"type": "output_audio", "transcript": "a", "audio": "AAA="}, "audio"),
    ],
)
def test_a_wrong_part_is_refused_at_its_place(
    role: str, part: dict[str, Any], param: str | None
) -> None:
    if param is None:
        message(role, part)
    else:
        assert part_refused(role, **part).param == f"item.content[0].{param}"


def test_what_the_model_cannot_take_is_refused_by_name() -> None:
    picture = part_refused("user", type="input_image", image_url="data:")
    assert (picture.param, picture.code) == ("item.content[0].type", "unsupported")
    call = refused(type="mcp_call", id="m")
    assert (call.param, call.code) == ("item.type", "unsupported")


def test_sound_over_the_limit_is_refused() -> None:
    part = {"type": "input_audio", "audio": in_base64(1.5)}
    with pytest.raises(ProtocolError, match=r"1\.5 s long; send at most 1 s"):
        read(max_audio_s=1.0, type="message", role="user", content=[part])


def test_items_go_where_the_client_wants_them() -> None:
    items = Items(LIMITS)
    assert items.last_id is None
    assert items.add(said("b", "b")) is None
    assert items.add(said("d", "d")) == "b"
    assert items.add(said("c", "c"), "b") == "b"
    assert items.add(said("a", "a"), "root") is None
    assert items.add(said("e", "e"), "d") == "d"
    assert ids(items) == ["a", "b", "c", "d", "e"]
    assert (items.previous_of("c"), items.previous_of("a"), items.last_id) == ("b", None, "e")
    assert len(items) == 5 and "c" in items


@pytest.mark.parametrize(
    ("item_id", "previous", "param", "code"),
    [
        ("a", None, "item.id", "item_create_duplicate_item_id"),
        ("root", None, "item.id", "item_create_duplicate_item_id"),
        ("b", "x", "previous_item_id", "item_create_invalid_previous_item_id"),
    ],
)
def test_an_item_that_cannot_be_placed_is_refused(
    item_id: str, previous: str | None, param: str, code: str
) -> None:
    items = conversation(said("a", "a"))
    with pytest.raises(ProtocolError) as caught:
        items.add(said("b", item_id), previous)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert ids(items) == ["a"]


def test_an_unknown_item_is_refused_by_each_event() -> None:
    items = conversation(said("a", "a"))
    for verb, act in {
        "retrieve": lambda: items.retrieved("x", PCM_24K),
        "delete": lambda: items.delete("x"),
        "truncate": lambda: items.truncate("x", 0, 0),
    }.items():
        with pytest.raises(ProtocolError) as caught:
            act()
        assert caught.value.code == f"item_{verb}_invalid_item_id"
        assert caught.value.param == "item_id"


def test_a_deleted_item_is_gone() -> None:
    items = conversation(said("a", "a"), reply("b", "b"), said("c", "c"))
    items.delete("b")
    assert ids(items) == ["a", "c"]
    assert plain(items.messages("")) == [("user", "a"), ("user", "c")]
    assert items.add(said("b", "b")) == "c"


def test_the_model_reads_the_instructions_and_then_all_in_order() -> None:
    items = conversation(
        message("system", {"type": "input_text", "text": "s"}),
        message(
            "user",
            {"type": "input_text", "text": "a"},
            {"type": "input_audio", "audio": in_base64(0.1)},
        ),
        reply("b", "b"),
        user_sound(tone(0.1)),
    )
    assert plain(items.messages("Be brief.")) == [
        ("system", "Be brief."),
        ("system", "s"),
        ("user", "a*"),
        ("assistant", "b"),
        ("user", "*"),
    ]
    assert plain(items.messages("", also=[said("late")]))[-1] == ("user", "late")
    assert Items(LIMITS).messages("") == ()


def test_what_is_not_finished_or_empty_is_not_read() -> None:
    items = conversation(
        said("a"),
        reply("b", "b", status="in_progress"),
        reply("c", "c", status="incomplete"),
        reply("d", "d"),
        FunctionCall("e", "call", "f", "{", status="in_progress"),
        said(""),
    )
    items.truncate("d", 0, 0)
    assert plain(items.messages("")) == [("user", "a"), ("assistant", "c")]
    assert not any(read_one.tool_calls for read_one in items.messages(""))
    assert len(items) == 6


def test_a_reply_in_progress_has_no_content_until_it_has_text() -> None:
    item = AssistantMessage("a")
    assert item.described()["content"] == []
    item.spoken.add_text("Hel", 0.0)
    assert item.described()["content"] == [{"type": "output_audio", "transcript": "Hel"}]
    written = AssistantMessage("b", speech=False, status="completed")
    assert written.described()["content"] == [{"type": "output_text", "text": ""}]


def test_calls_of_a_reply_are_read_together_with_their_results() -> None:
    items = conversation(
        said("weather?"),
        reply("Let me see.", "r"),
        FunctionCall("c1", "call_1", "weather", '{"town": "Bonn"}'),
        FunctionCall("c2", "call_2", "weather", '{"town": "Rom"}'),
        FunctionOutput("o1", "call_1", "rain"),
        FunctionOutput("o2", "call_2", "sun"),
        reply("Rain and sun.", "s"),
    )
    messages = items.messages("")
    assert plain(messages) == [
        ("user", "weather?"),
        ("assistant", "Let me see."),
        ("tool", "rain"),
        ("tool", "sun"),
        ("assistant", "Rain and sun."),
    ]
    assert [call.arguments for call in messages[1].tool_calls] == [
        '{"town": "Bonn"}',
        '{"town": "Rom"}',
    ]


def test_a_call_without_words_is_a_message_of_its_own() -> None:
    items = conversation(said("a"), FunctionCall("c", "call_1", "f", "{}"))
    (_, call) = items.messages("")
    assert (call.role, call.content) == ("assistant", ())
    assert call.tool_calls[0].name == "f"


def test_a_result_without_its_call_is_refused_or_not_read() -> None:
    items = conversation(said("a"), FunctionCall("c", "call_1", "f", "{}"))
    with pytest.raises(ProtocolError) as caught:
        items.add(FunctionOutput("o", "call_2", "x"))
    assert caught.value.param == "item.call_id"
    with pytest.raises(ProtocolError):
        items.add(FunctionOutput("o", "call_1", "x"), "root")
    items.add(FunctionOutput("o", "call_1", "x"))
    items.delete("c")
    assert plain(items.messages("")) == [("user", "a")]


def test_a_reply_that_was_cut_has_the_text_that_was_heard() -> None:
    text = "one two three four five six"
    items = conversation(said("count"), reply(text, "a", ms=6000))
    assert items.truncate("a", 0, 3000) == 3000
    heard = items.get("a").described()["content"][0]["transcript"]
    assert heard and heard != text and text.startswith(heard)
    assert plain(items.messages(""))[-1] == ("assistant", heard)


def test_an_end_is_clamped_to_what_there_is() -> None:
    items = conversation(reply("one two three", "a", ms=1000))
    assert items.truncate("a", 0, 1_000_000) == 1000
    assert items.get("a").text == "one two three"
    assert items.truncate("a", 0, 500) == 500
    shorter = items.get("a").text
    assert items.truncate("a", 0, 900) == 500
    assert items.get("a").text == shorter
    assert items.truncate("a", 0, -85) == 0
    assert items.get("a").text == ""


def test_only_spoken_replies_can_be_cut() -> None:
    given = message("assistant", {"type": "output_text", "text": "a"}, id="given")
    items = conversation(said("a", "a"), AssistantMessage("b", speech=False), given)
    for item_id in ("a", "b", "given"):
        with pytest.raises(ProtocolError) as caught:
            items.truncate(item_id, 0, 0)
        assert caught.value.param == "item_id"
    items.add(reply("c", "c"))
    with pytest.raises(ProtocolError) as caught:
        items.truncate("c", 1, 0)
    assert caught.value.param == "content_index"


def test_input_of_a_response_is_read_in_place_of_the_conversation() -> None:
    items = conversation(said("a", "a"), said("b", "b"))
    new = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "new"}]}
    chosen = items.chosen(({"type": "item_reference", "id": "b"}, new), PCM_24K)
    assert plain(items.messages("", chosen)) == [("user", "b"), ("user", "new")]
    assert ids(items) == ["a", "b"]
    assert items.messages("", items.chosen((), PCM_24K)) == ()


@pytest.mark.parametrize(
    ("wire", "param"),
    [
        ({"type": "item_reference", "id": "x"}, "response.input[1].id"),
        ({"type": "item_reference"}, "response.input[1].id"),
        ({"type": "message", "role": "user", "content": [{}]}, "response.input[1].content[0].type"),
        (
            {"type": "function_call_output", "call_id": "c", "output": ""},
            "response.input[1].call_id",
        ),
        ({"type": "item_reference", "id": "a"}, "response.input[1].id"),
    ],
)
def test_wrong_input_of_a_response_is_named(wire: dict[str, Any], param: str) -> None:
    items = conversation(said("a", "a"))
    with pytest.raises(ProtocolError) as caught:
        items.chosen(({"type": "item_reference", "id": "a"}, wire), PCM_24K)
    assert caught.value.param == param


def test_input_of_a_response_has_the_limits_of_a_conversation() -> None:
    items = conversation(said("a" * 90), said("b" * 90, "b"), limits=Limits(max_text_chars=200))
    text = {"type": "input_text", "text": "c" * 111}
    new = {"type": "message", "role": "user", "content": [text]}
    with pytest.raises(ProtocolError, match="201 characters") as caught:
        items.chosen(({"type": "item_reference", "id": "b"}, new), PCM_24K)
    assert caught.value.param == "response.input[1]"


def test_an_item_fits_into_a_frame() -> None:
    text = {"type": "input_text", "text": "\x01" * 180_000}
    error = part_refused("user", **text)
    assert (error.param, error.code) == ("item", "item_too_large")
    part = {"type": "input_audio", "audio": in_base64(0.1), "transcript": "x" * 150_000}
    items = conversation(message("user", part))
    with pytest.raises(ProtocolError, match="300000 characters"):
        items.add(message("user", part))


def long_talk(turns: int) -> Items:
    items = conversation(message("system", {"type": "input_text", "text": "s"}, id="s"))
    for number in range(turns):
        items.add(said(f"u{number}".ljust(297, "x"), f"u{number}"))
        items.add(reply("y" * 297, f"a{number}"))
    return items


def first_read(items: Items) -> str:
    """The first two letters of what a user said."""
    return next(text[:2] for role, text in plain(items.messages("")) if role == "user")


def too_long(positions: int, room: int) -> PromptTooLong:
    return PromptTooLong("too long", positions, room)


def test_the_oldest_turns_leave_a_prompt_that_is_too_long() -> None:
    items = long_talk(10)
    assert items.shorten(too_long(1010, 1000), LEAST)
    assert first_read(items) == "u1"
    assert items.shorten(too_long(1000, 600), LEAST)
    assert first_read(items) == "u5"
    assert plain(items.messages("i"))[:2] == [("system", "i"), ("system", "s")]
    assert len(items) == 21 and items.retrieved("u0", PCM_24K)


def test_a_share_of_the_room_is_kept_so_that_the_next_turns_fit() -> None:
    usual = long_talk(10)
    assert usual.shorten(too_long(1010, 1000), AUTO)
    assert first_read(usual) == "u3"
    items = long_talk(10)
    assert items.shorten(too_long(1000, 1000), Truncation("retention_ratio", 0.6))
    assert first_read(items) == "u5"
    everything = long_talk(10)
    assert everything.shorten(too_long(1000, 1000), Truncation("retention_ratio", 0.0))
    assert first_read(everything) == "u9"


def test_instructions_count_but_do_not_go() -> None:
    items = long_talk(10)
    assert items.shorten(too_long(2000, 1600), LEAST, "i" * 6000)
    assert first_read(items) == "u4"


def test_sound_counts_as_what_the_model_hears() -> None:
    items = conversation(user_sound(tone(40), "sound"), reply("b", "b"))
    for number in range(9):
        items.add(said(f"u{number}".ljust(297, "x"), f"u{number}"))
        items.add(reply("c", f"c{number}"))
    assert items.shorten(too_long(100, 72), LEAST)
    assert first_read(items) == "u0"


def test_a_system_message_between_is_no_answer() -> None:
    between = message("system", {"type": "input_text", "text": "s"})
    items = conversation(said("a"), between, said("b"), reply("c", "c"), said("d"))
    assert items.shorten(too_long(9, 8), AUTO)
    assert plain(items.messages("")) == [("user", "d")]


def test_an_id_may_be_used_again_for_what_is_to_be_read() -> None:
    items = conversation(said("a", "a"), reply("b", "b"), said("c", "c"))
    assert items.shorten(too_long(9, 8), AUTO)
    items.delete("a")
    items.add(said("again", "a"))
    assert plain(items.messages("")) == [("user", "c"), ("user", "again")]


def test_the_last_turn_stays_and_nothing_goes_where_it_may_not() -> None:
    items = long_talk(3)
    assert not items.shorten(too_long(9, 8), DISABLED)
    assert first_read(items) == "u0"
    assert items.shorten(too_long(10_000, 1), AUTO)
    assert first_read(items) == "u2"
    assert not items.shorten(too_long(10_000, 1), AUTO)
    assert not Items(LIMITS).shorten(too_long(10_000, 1), AUTO)


def test_a_turn_goes_with_its_calls_and_their_results() -> None:
    items = conversation(
        said("a", "u0"),
        said("a", "u1"),
        FunctionCall("c", "call_1", "f", "{}"),
        FunctionOutput("o", "call_1", "x"),
        reply("b", "b"),
        said("c", "u2"),
    )
    assert items.shorten(too_long(9, 8), AUTO)
    assert plain(items.messages("")) == [("user", "c")]
    items.add(FunctionOutput("late", "call_1", "x"))
    assert plain(items.messages("")) == [("user", "c")]


@pytest.mark.parametrize(
    "wire",
    [
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "x"},
    ],
)
def test_calls_are_refused_where_the_model_has_no_place_for_them(wire: dict[str, Any]) -> None:
    items = conversation(said("a", "a"), limits=Limits(no_calls="send none"))
    with pytest.raises(ProtocolError, match="send none") as caught:
        items.add(read(**wire))
    assert (caught.value.param, caught.value.code) == ("item.type", "unsupported")
    with pytest.raises(ProtocolError, match="send none") as caught:
        items.chosen((wire,), PCM_24K)
    assert caught.value.param == "response.input[0].type"
    assert ids(items) == ["a"]


def test_a_call_that_the_model_makes_itself_is_never_refused() -> None:
    items = conversation(limits=Limits(no_calls="send none"))
    made = FunctionCall("call", "c", "f", "")
    made.status = "in_progress"
    items.add(made)
    assert ids(items) == ["call"]


def test_limits_are_those_of_the_server() -> None:
    config = ServerConfig(max_messages=7, max_text_chars=8, max_audio_s=9)
    limits = Limits.of(config, TalkConfig(talk_audio_s=10))
    assert limits == Limits(max_items=7, max_text_chars=8, max_audio_s=9.0, max_total_audio_s=10.0)


@pytest.mark.parametrize(
    ("limits", "item", "word"),
    [
        (Limits(max_items=2), said("c"), "2 items"),
        (Limits(max_text_chars=5), said("cccc"), "6 characters"),
        (Limits(max_total_audio_s=0.5), user_sound(tone(1)), "1 s"),
    ],
)
def test_a_full_conversation_says_so(limits: Limits, item: Item, word: str) -> None:
    items = conversation(said("a", "a"), said("b", "b"), limits=limits)
    with pytest.raises(ProtocolError, match=word) as caught:
        items.add(item)
    assert caught.value.code == "conversation_full"
    assert ids(items) == ["a", "b"]
    items.add(AssistantMessage("reply"))


def test_a_full_conversation_forgets_first_what_is_no_longer_read() -> None:
    items = conversation(
        said("a", "a"), reply("b", "b"), said("c", "c"), limits=Limits(max_items=3)
    )
    assert items.shorten(too_long(9, 8), AUTO)
    assert items.add(said("d", "d")) == "c"
    assert ids(items) == ["b", "c", "d"]
    assert items.forgotten() == ("a",)
    assert items.forgotten() == ()
    assert items.add(said("e", "e"), "b") is None
    assert ids(items) == ["e", "c", "d"]


def test_what_is_refused_takes_nothing_away() -> None:
    items = conversation(
        said("a", "a"), reply("b", "b"), said("c", "c"), limits=Limits(max_text_chars=3)
    )
    assert items.shorten(too_long(9, 8), AUTO)
    with pytest.raises(ProtocolError, match="5 characters"):
        items.add(said("long"))
    assert ids(items) == ["a", "b", "c"]
    assert items.forgotten() == ()


def test_parts_of_a_message_are_read_as_one() -> None:
    parts = tuple(Written(text) for text in ("a", "", "b"))
    (read_back,) = conversation(MessageItem("m", "user", parts)).messages("")
    assert read_back.content == (Text("a"), Text("b"))
