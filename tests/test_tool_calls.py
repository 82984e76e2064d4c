"""Functions that the model may call: told to it, called by it, never spoken."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from golden_models import GOLDEN, Caller, conversations, question, run
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from omnispeech.chat_template import ChatTemplate
from omnispeech.config import DecoderConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import (
    AudioDelta,
    Done,
    Message,
    Text,
    TextDelta,
    Tool,
    ToolCall,
    TurnRequest,
)
from omnispeech.engine.tool_calls import CallReader, described, described_call
from omnispeech.errors import RequestError, Unsupported
from omnispeech.prompt import AUDIO_MARKER, PromptBuilder
from omnispeech.tiny.tokenizer import CHAT_TEMPLATE

QUICK = DecoderConfig(euler_steps=1, first_block=10)
TOKENIZER = Tokenizer.from_file(str(GOLDEN / "opens2s" / "opens2s-tiny" / "tokenizer.json"))
ADDED = {t.content: i for i, t in TOKENIZER.get_added_tokens_decoder().items()}
END = ADDED["<|im_end|>"]
WEATHER = Tool("weather", "Today's", {"type": "object", "properties": {"city": {}}})
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
CALLED = ToolCall("weather", '{"city": "Zürich"}')
MANNERS = """\
{%- for m in messages if m.role == 'assistant' and m.tool_calls %}
    {%- for call in m.tool_calls %}
        {%- if call.function %}{%- set call = call.function %}{%- endif %}
        {%- if call.arguments is string %}{{- raise_exception('text') }}{%- endif %}
        {{- '<tool_call>' + call.name + (call.arguments | tojson) + '</tool_call>' }}
    {%- endfor %}
{%- endfor %}
{%- for m in messages %}
    {{- m.content.split('</think>')[-1] + '<|im_end|>' }}
{%- endfor %}
{%- for tool in tools or () %}{{- tool | tojson(indent=1) }}{%- endfor %}
"""


@cache
def prompts(template: str = CHAT_TEMPLATE, *, compatible: bool = False) -> PromptBuilder:
    chat = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, chat_template=template)
    return PromptBuilder(TOKENIZER, ChatTemplate(chat), compatible=compatible)


def engine(template: str = CHAT_TEMPLATE, **changes: Any) -> Conversations:
    return conversations(QUICK, prompt=prompts(template), **changes)


def asked(*more: Message, **settings: Any) -> TurnRequest:
    """With a function, unless `settings` say otherwise."""
    request = question(**{"tools": (WEATHER,), "speech_temperature": 0.0, **settings})
    return replace(request, messages=(*request.messages, *more))


def prompt_text(request: TurnRequest, template: str = CHAT_TEMPLATE) -> str:
    ids = engine(template).open(request, print).prompt
    return str(TOKENIZER.decode([i for i in ids if i >= 0], skip_special_tokens=False))


def tokens(*parts: str) -> list[int]:
    """As the model writes them: marks are tokens of their own."""
    ids = (TOKENIZER.encode(part, add_special_tokens=False).ids for part in parts)
    return [i for piece in ids for i in piece] + [END]


def plain_tokens(text: str) -> list[int]:
    """As a model writes them whose tokenizer has no such marks."""
    return [*prompts().reply_ids(text)[:-2], END]


def replied(
    ids: list[int], request: TurnRequest | None = None, on: Conversations | None = None
) -> Caller:
    """A model that writes these ids."""
    on = on or engine(text_end=frozenset([END]))
    caller = Caller(on, replace(request or asked(), max_new_tokens=500))
    caller.session.script = ids
    run(on)
    assert isinstance(caller.events[-1], Done), caller.events
    return caller


def calls(caller: Caller) -> list[ToolCall]:
    return [event for event in caller.events if isinstance(event, ToolCall)]


def read(pieces: Sequence[str]) -> list[str | ToolCall]:
    """Words joined."""
    reader = CallReader()
    told = [event for piece in pieces for event in reader.push(piece)] + reader.finish()
    joined: list[str | ToolCall] = []
    for event in told:
        if isinstance(event, str) and joined and isinstance(joined[-1], str):
            joined[-1] += event
        else:
            joined.append(event)
    return joined


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CALL, [CALLED]),
        (f"Let me see.\n{CALL}\n", ["Let me see.", CALLED]),
        (f"{CALL}\n{CALL}", [CALLED, CALLED]),
        (f"a {CALL} b", ["a", CALLED, " b"]),
        ('<tool_call>{"name": "f"}</tool_call>', [ToolCall("f", "{}")]),
        ("a < b <tool", ["a < b <tool"]),
        ("spaces stay  \n", ["spaces stay  \n"]),
        ("a\n<tool_call>{}</tool_call>", ["a\n<tool_call>{}</tool_call>"]),
        ("<tool_call>[1]</tool_call>", ["<tool_call>[1]</tool_call>"]),
        ('<tool_call>{"name": 1}</tool_call>', ['<tool_call>{"name": 1}</tool_call>']),
        (
            '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
            ['<tool_call>{"name": "f", "arguments": "x"}</tool_call>'],
        ),
        (f"a\n {CALL[:-1]}", [f"a\n {CALL[:-1]}"]),
        (
            '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
            ['<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>'],
        ),
        (
            r'<tool_call>{"name": "f", "arguments": {"x": "\ud83d"}}</tool_call>',
            [r'<tool_call>{"name": "f", "arguments": {"x": "\ud83d"}}</tool_call>'],
        ),
        (f"<tool_call>{'[' * 100_000}</tool_call>", [f"<tool_call>{'[' * 100_000}</tool_call>"]),
    ],
)
def test_words_and_calls_are_told_apart(text: str, expected: list[str | ToolCall]) -> None:
    assert read([text]) == expected


@given(
    st.lists(st.sampled_from([CALL, "<tool_call>", "</tool_call>", "{}", "<", "a b", " ", "\n"])),
    st.data(),
)
def test_however_the_text_is_cut_it_is_told_apart_alike(
    parts: list[str], data: st.DataObject
) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    assert read([text[a:b] for a, b in pairwise([0, *cuts, len(text)])]) == read([text])


@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "{", "}", "<", "a ", " ", "\n"])))
def test_of_words_nothing_is_lost_but_spaces_beside_what_was_nearly_a_call(
    parts: list[str],
) -> None:
    """No call can be made of these."""
    text = "".join(parts)
    told = "".join(event for event in read(parts) if isinstance(event, str))
    assert "".join(told.split()) == "".join(text.split())
    assert told == text or "<tool_call>" in text


@pytest.mark.parametrize("made", [tokens(CALL), plain_tokens(CALL)], ids=["token", "text"])
def test_a_reply_that_is_a_call_has_no_sound(made: list[int]) -> None:
    caller = replied(made)
    done = caller.events[-1]
    assert isinstance(done, Done)
    assert caller.events[:-1] == [CALLED]
    assert (done.units, done.text_finish, done.speech_finish) == (0, "stop", "stop")
    assert caller.ids[1] == [] and not caller.session.conditions


@pytest.mark.parametrize("run_ahead", [0, 3, 40])
@pytest.mark.parametrize("words", ["Hm", "Let me see", "One moment, I will have a look."])
def test_the_words_before_a_call_are_spoken_to_their_end_and_no_more(
    words: str, run_ahead: int
) -> None:
    on = engine(text_end=frozenset([END]), run_ahead=run_ahead)
    caller = replied(tokens(words, "\n", CALL), on=on)
    done = caller.events[-1]
    assert isinstance(done, Done)
    assert caller.text == words and calls(caller) == [CALLED]
    spoken = len(TOKENIZER.encode(words).ids)
    assert caller.session.interleaver.spoken_end == spoken
    assert done.units == -(-spoken // 2) * 4 + 40  # spans of 2:4, then to the limit of the model
    assert sum(isinstance(event, AudioDelta) for event in caller.events) > 0


@pytest.mark.parametrize("words", ["Hm", "Let me see", "One moment please", "a < b"])
def test_when_the_call_is_written_changes_no_unit(words: str) -> None:
    """The units of the words are the same whether the LLM is far ahead or not."""
    replies = []
    for run_ahead in (0, 1, 5, 40):
        on = engine(text_end=frozenset([END]), run_ahead=run_ahead)
        replies.append(replied(tokens(words, "\n", CALL), on=on))
    assert len({tuple(reply.ids[1]) for reply in replies}) == 1
    assert len({reply.pcm for reply in replies}) == 1


def test_the_call_is_told_while_the_words_are_still_spoken() -> None:
    kinds = [type(event) for event in replied(tokens("One moment, please.", CALL)).events]
    assert kinds.index(ToolCall) < len(kinds) - 1 - kinds[::-1].index(AudioDelta)


def test_a_call_that_is_longer_than_the_sound_is_waited_for() -> None:
    arguments = {"text": "word " * 60}
    call = f"<tool_call>{json.dumps({'name': 'f', 'arguments': arguments})}</tool_call>"
    on = engine(text_end=frozenset([END]), unit_limit=1, speech_end=frozenset())
    caller = replied(tokens("Hm", call), on=on)
    assert caller.events[-2] == ToolCall("f", json.dumps(arguments))
    assert caller.session.flushed


def test_several_calls_in_one_reply() -> None:
    caller = replied(tokens(CALL, "\n", CALL.replace("weather", "rain")))
    assert caller.events[:-1] == [CALLED, ToolCall("rain", CALLED.arguments)]


def test_what_is_no_call_is_given_as_text() -> None:
    broken = '<tool_call>\n{"name": "weather", \n</tool_call>'
    caller = replied(tokens("Hm ", broken))
    assert (caller.text, calls(caller)) == (f"Hm {broken}", [])


def test_a_call_that_is_cut_by_the_limit_is_given_as_text() -> None:
    on = engine(text_end=frozenset([END]), max_new_tokens=12)
    caller = replied(tokens(CALL), on=on)
    done = caller.events[-1]
    assert isinstance(done, Done) and done.text_finish == "length"
    assert CALL.startswith(caller.text.strip()) and caller.text.startswith("<tool_call>\n{")


def test_without_functions_a_mark_is_text_and_spoken() -> None:
    caller = replied(tokens("Hm ", CALL), asked(tools=()))
    assert caller.text == f"Hm {CALL}" and not calls(caller)
    assert caller.session.interleaver.spoken_end is None


@pytest.mark.parametrize("words", ["I am well, thank you.", "a < b <tool", "\n\nwell  \n"])
def test_a_reply_that_calls_nothing_sounds_as_if_there_were_no_functions(words: str) -> None:
    """On the same prompt; what was held back comes too."""
    with_tools = replied(tokens(words))
    prompt = with_tools.session.prompt
    on = engine(text_end=frozenset([END]))
    on.models.prompt.build = lambda *_: prompt  # type: ignore[method-assign]
    try:
        without = replied(tokens(words), asked(tools=()), on)
    finally:
        del on.models.prompt.build
    assert with_tools.ids == without.ids
    assert with_tools.text == without.text == words
    assert with_tools.pcm == without.pcm


def test_a_call_in_a_written_turn() -> None:
    caller = replied(tokens("Hm ", CALL), asked(speech=False))
    assert (caller.text, calls(caller), caller.pcm) == ("Hm", [CALLED], b"")


def test_others_speak_on_while_one_calls() -> None:
    on = engine(text_end=frozenset([END]))
    alone = replied(tokens("How nice it is here."), asked(tools=()), on)
    other = Caller(on, replace(asked(tools=()), max_new_tokens=500))
    other.session.script = alone.session.script
    caller, most = Caller(on, asked(max_new_tokens=500)), 0
    caller.session.script = tokens(CALL)
    while not on.idle:
        on.step()
        most = max(most, len(caller.session.conditions))
    assert calls(caller) == [CALLED] and other.ids == alone.ids
    assert most == 1  # of the state that chose the mark; none is kept after it


def test_a_text_that_is_given_calls_nothing() -> None:
    on = engine()
    caller = Caller(on, asked(script=f"Say {CALL}"))
    run(on)
    assert (caller.text, calls(caller)) == (f"Say {CALL}", [])
    assert caller.pcm


def test_a_caller_that_leaves_in_the_middle_of_a_call_frees_its_rows_within_one_step() -> None:
    on = engine(text_end=frozenset([END]))
    caller = Caller(on, asked(max_new_tokens=500))
    caller.session.script = tokens("Hm ", CALL)
    while caller.session.interleaver.spoken_end is None:
        on.step()
    caller.session.cancelled = True
    on.step()
    assert on.idle and on.runner.speech_cache.used_tokens == 0


def test_the_functions_calls_and_results_are_in_the_prompt() -> None:
    called = Message("assistant", (Text("Let me see."),), (CALLED,))
    text = prompt_text(asked(called, Message("tool", (Text("17 degrees"),))))
    assert json.dumps(described(WEATHER)) in text
    assert f"Let me see.\n{CALL}<|im_end|>" in text
    assert "<tool_response>\n17 degrees\n</tool_response>" in text


def test_a_prompt_without_functions_is_what_it_was() -> None:
    own = conversations(QUICK).models.prompt
    assert engine().open(asked(tools=()), print).prompt == (
        conversations(QUICK, prompt=own).open(asked(tools=()), print).prompt
    )


def test_the_next_turn_goes_on_from_the_prompt_of_the_call() -> None:
    on = engine(text_end=frozenset([END]))
    replied(tokens("Hm ", CALL), on=on)
    called = Message("assistant", (Text("Hm"),), (CALLED,))
    next_turn = asked(called, Message("tool", (Text("17 degrees"),)), speech=False)
    again = replied(tokens("Fine."), next_turn, on).events[-1]
    assert isinstance(again, Done)
    assert again.cached_tokens > 100


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MANNERS], ids=["tiny", "other manners"])
@given(
    bad=st.lists(
        st.sampled_from([*ADDED, AUDIO_MARKER, "<|im_", "end|>", "<", "</", '"', "\\", "\n", "a"]),
        max_size=6,
    ).map("".join)
)
def test_nothing_of_a_function_or_its_result_becomes_a_control_token(
    template: str, bad: str
) -> None:
    def control(word: str) -> list[int]:
        tool = Tool(f"f{word}", word, {word: {"enum": [word, 1, None, [word]]}})
        call = ToolCall(word, json.dumps({word: [word]}))
        past = (Message("assistant", (Text(word),), (call,)), Message("tool", (Text(word),)))
        request = asked(*past, tools=(tool,))
        functions = [described(tool) for tool in request.tools]
        from omnispeech.engine.conversations import _prompt_message

        ids = prompts(template).build([_prompt_message(m) for m in request.messages], functions)
        return [i for i in ids if i in ADDED.values() or i < 0]

    assert control(bad) == control("a")


def test_control_tokens_in_a_function_stay_readable() -> None:
    tool = Tool("f", "<|im_end|> \ue000", {"<|im_start|>": "</tool_call>"})
    assert '"<|im_end|> \ue000", "parameters": {"<|im_start|>": "</tool_call>"}' in prompt_text(
        asked(tools=(tool,))
    )


def test_a_template_that_leaves_functions_out_is_said_to() -> None:
    own = conversations(QUICK)
    with pytest.raises(Unsupported, match="no place for functions; send no tools"):
        own.open(asked(), print)
    called = Message("assistant", (Text("."),), (CALLED,))
    for past in ((called,), (Message("tool", (Text("17"),)),)):
        with pytest.raises(Unsupported, match="no place for calls of functions"):
            own.open(asked(*past, tools=()), print)


def test_a_template_that_refuses_a_result_is_said_to() -> None:
    refusing = "{% if messages[-1].role == 'tool' %}{{ raise_exception('no') }}{% endif %}x"
    with pytest.raises(Unsupported, match="no place for calls of functions"):
        engine(refusing).open(asked(Message("tool", (Text("17"),)), tools=()), print)


def test_the_compatible_mode_knows_no_functions() -> None:
    compatible = conversations(
        QUICK, compatible=True, prompt=prompts(CHAT_TEMPLATE, compatible=True)
    )
    with pytest.raises(Unsupported, match="start the server without --compatible"):
        compatible.open(asked(), print)


@pytest.mark.parametrize("arguments", ["", "{", "[]", "3", "[" * 100_000])
def test_arguments_of_an_earlier_call_that_are_no_object_are_refused(arguments: str) -> None:
    with pytest.raises(RequestError, match="call of 'weather' .* send a JSON object"):
        described_call(ToolCall("weather", arguments))


@pytest.mark.parametrize("value", [{1, 2}, float, b"x"])
def test_parameters_that_are_no_json_are_refused(value: object) -> None:
    with pytest.raises(RequestError, match="parameters of the tool 'f' are no JSON"):
        described(Tool("f", "", {"x": value}))


@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_parameters_without_a_bottom_are_refused_or_read(depth: int) -> None:
    nested: dict[str, Any] = {}
    for _ in range(depth):
        nested = {"x": nested}
    try:
        engine(context_length=4096).open(asked(tools=(Tool("f", "", nested),)), print)
    except RequestError as refused:
        assert "nested too deeply" in str(refused) or "no JSON" in str(refused)
    else:
        assert depth < 1000


def test_half_a_character_in_a_function_or_a_call_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match=r"U\+D800"):
        engine().open(asked(tools=(Tool("f", "\ud800"),)), print)
    called = Message("assistant", (), (ToolCall("f", r'{"x": "\ud800"}'),))
    with pytest.raises(RequestError, match=r"U\+D800"):
        engine().open(asked(called), print)


def test_only_the_assistant_calls() -> None:
    with pytest.raises(RequestError, match="message of the user calls functions"):
        Message("user", (Text("hi"),), (CALLED,))


def test_parameters_may_be_left_out() -> None:
    assert described(Tool("f"))["function"]["parameters"] == {"type": "object", "properties": {}}


def test_text_of_a_call_is_not_told_as_text() -> None:
    caller = replied(tokens("Hm ", CALL, "\n", "bye"))
    texts = [event.text for event in caller.events if isinstance(event, TextDelta)]
    assert "".join(texts) == "Hm\nbye"
