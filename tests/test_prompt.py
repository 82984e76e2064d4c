import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from omnispeech.errors import CheckpointError, RequestError
from omnispeech.prompt import (
    AUDIO,
    AUDIO_MARKER,
    AUDIO_SLOT,
    AudioMark,
    PromptBuilder,
    PromptMessage,
    UnitVocabulary,
)
from omnispeech.tiny.tokenizer import CHAT_TEMPLATE

GOLDEN = Path(__file__).parent / "golden" / "opens2s"
TINY = GOLDEN / "opens2s-tiny"
CASES = ("text", "audio2s", "twoturn")

TOKENIZER = Tokenizer.from_file(str(TINY / "tokenizer.json"))
ADDED = {t.content: i for i, t in TOKENIZER.get_added_tokens_decoder().items()}
SAFE = PromptBuilder.from_directory(TINY)
COMPATIBLE = PromptBuilder.from_directory(TINY, compatible=True)

Builder = pytest.mark.parametrize("builder", [SAFE, COMPATIBLE], ids=["default", "compatible"])
texts = st.text(st.characters(codec="utf-8"), max_size=40)
plain_texts = texts.filter(lambda text: not any(t in text for t in (*ADDED, AUDIO_MARKER)))
texts_of_pieces = st.lists(
    st.sampled_from([*ADDED, AUDIO_MARKER, "<|im_", "end|>", "<", "|", "audio", "\n", " ", "a"]),
    max_size=8,
).map("".join)


def user(*parts: str | AudioMark) -> PromptMessage:
    return PromptMessage("user", parts)


def parts_of(content: Any) -> tuple[str | AudioMark, ...]:
    items = content if isinstance(content, list) else [content]
    texts = (item if isinstance(item, str) else item.get("text", AUDIO) for item in items)
    return tuple(texts)


def control_ids(ids: list[int]) -> list[int]:
    return [i for i in ids if i in ADDED.values() or i == AUDIO_SLOT]


def copied(target: Path) -> Path:
    return Path(
        shutil.copytree(TINY, target / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    )


def rewrite(file: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.chmod(0o644)
    file.write_text(json.dumps(value))


@Builder
@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_the_original(builder: PromptBuilder, case: str) -> None:
    expected = json.loads((GOLDEN / "expected-opens2s-tiny" / f"{case}.json").read_text())
    messages = [PromptMessage(m["role"], parts_of(m["content"])) for m in expected["messages"]]
    assert builder.build(messages) == expected["input_ids"]


@given(st.lists(plain_texts, min_size=1, max_size=3), st.booleans())
def test_text_without_control_tokens_gives_the_ids_of_the_original(
    contents: list[str], audio_first: bool
) -> None:
    messages = [user(*(AUDIO, text) if audio_first else (text, AUDIO)) for text in contents]
    assert SAFE.build(messages) == COMPATIBLE.build(messages)


@pytest.mark.parametrize(
    "text",
    ["\n\na", "a\n\n", "  a ", "", "\r\n", "e\u0301 \u212b \u1e9b\u0323", "\u0338", "\ue000"],
)
def test_edges_of_a_text_and_normalisation_give_the_ids_of_the_original(text: str) -> None:
    for message in (user(text), user(AUDIO, text), PromptMessage("assistant", (text,))):
        assert SAFE.build([message]) == COMPATIBLE.build([message])


@given(texts_of_pieces, texts)
def test_no_text_of_a_client_becomes_a_control_token(text: str, more: str) -> None:
    for role in ("user", "assistant", "system"):
        ids = SAFE.build([PromptMessage(role, (text, more, AUDIO)), user("b")])
        harmless = SAFE.build([PromptMessage(role, ("a", AUDIO)), user("b")])
        assert control_ids(ids) == control_ids(harmless)


@given(texts_of_pieces)
def test_control_tokens_of_a_client_stay_readable_text(text: str) -> None:
    prompt = SAFE.decode_text(SAFE.build([user(text)]))
    assert f"user\n{text}\nassistant" in prompt


@pytest.mark.parametrize(
    "text",
    ["<|im_<|im_end|>end|>", "<<|im_end|>|im_end|>", "<th<think>ink>", "<|im_audio<|im_audio|>|>"],
)
def test_nested_control_tokens_do_not_form_one_when_the_mark_is_taken_out(text: str) -> None:
    assert control_ids(SAFE.build([user(text)])) == control_ids(SAFE.build([user("a")]))


def test_a_control_token_cut_over_two_parts_stays_text() -> None:
    ids = SAFE.build([user("<|im_", "end|>")])
    assert control_ids(ids) == control_ids(SAFE.build([user("a")]))


def test_a_text_with_the_private_use_characters_keeps_them() -> None:
    text = "<|im_end|>" + "".join(map(chr, range(0xE000, 0xF900)))
    assert text in SAFE.decode_text(SAFE.build([user(text)]))


def test_the_compatible_mode_lets_control_tokens_through_as_the_original_does() -> None:
    ids = COMPATIBLE.build([user("a<|im_end|>")])
    assert ids.count(ADDED["<|im_end|>"]) == 3


def test_the_compatible_mode_refuses_a_text_with_the_audio_marker() -> None:
    with pytest.raises(RequestError, match="places for 2 audios, the messages have 1"):
        COMPATIBLE.build([user(AUDIO_MARKER, AUDIO)])


def test_the_system_message_of_a_client_replaces_the_default_one() -> None:
    own = PromptMessage("system", ("Speak like a pirate.",))
    text = SAFE.decode_text(SAFE.build([own, user("hi")]))
    assert "pirate" in text and "helpful" not in text
    assert "helpful" in COMPATIBLE.decode_text(COMPATIBLE.build([own, user("hi")]))


@Builder
def test_the_prompt_ends_with_the_start_of_speech(builder: PromptBuilder) -> None:
    assert builder.build([user("hi")])[-1] == ADDED["<|im_tts_start|>"]


@Builder
def test_an_unknown_role_is_refused(builder: PromptBuilder) -> None:
    with pytest.raises(RequestError, match="unknown role 'user<|im_end|>'"):
        builder.build([PromptMessage("user<|im_end|>", ("hi",))])


@Builder
def test_a_lone_surrogate_is_refused_by_name(builder: PromptBuilder) -> None:
    with pytest.raises(RequestError, match=r"character 1 .* U\+D800"):
        builder.build([user("a\ud800")])


def test_a_template_of_its_own_file_comes_first(tmp_path: Path) -> None:
    path = copied(tmp_path)
    (path / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[1].content }}")
    ids = PromptBuilder.from_directory(path).build([user("x", AUDIO)])
    start, end, speech = (ADDED[f"<|im_{n}|>"] for n in ("audio_start", "audio_end", "tts_start"))
    assert ids == [ADDED["<|im_end|>"], *TOKENIZER.encode("x").ids, start, AUDIO_SLOT, end, speech]


def test_a_template_in_its_own_json_file_or_among_several_is_found(tmp_path: Path) -> None:
    path = copied(tmp_path)
    several = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    rewrite(path / "tokenizer_config.json", lambda c: c.update(chat_template=several))
    assert SAFE.decode_text(PromptBuilder.from_directory(path).build([user("x")])) == "yes"
    (path / "chat_template.json").write_text('{"chat_template": "own"}')
    assert SAFE.decode_text(PromptBuilder.from_directory(path).build([user("x")])) == "own"


def test_a_template_that_drops_an_audio_is_noticed(tmp_path: Path) -> None:
    path = copied(tmp_path)
    (path / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    with pytest.raises(RequestError, match="places for 0 audios, the messages have 1"):
        PromptBuilder.from_directory(path).build([user(AUDIO), user("b")])


def test_a_refusal_of_the_template_reaches_the_caller(tmp_path: Path) -> None:
    path = copied(tmp_path)
    (path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate"):
        PromptBuilder.from_directory(path).build([user("a")])


BOTH = {"tools", "tool_calls"}
ONLY_FUNCTIONS = "{{ tools | tojson if tools }}{{ messages[-1].content }}"
BREAKS = "{% if tools %}{{ 1 + tools }}{% endif %}{{ messages[-1].content }}"


@pytest.mark.parametrize(
    ("template", "missing"),
    [(CHAT_TEMPLATE, set()), (ONLY_FUNCTIONS, {"tool_calls"}), (BREAKS, BOTH)],
)
def test_what_a_template_has_no_place_for_is_known(
    tmp_path: Path, template: str, missing: set[str]
) -> None:
    path = copied(tmp_path)
    (path / "chat_template.jinja").write_text(template)
    assert PromptBuilder.from_directory(path).unsupported.keys() == missing
    assert PromptBuilder.from_directory(path, compatible=True).unsupported.keys() == BOTH


def test_the_template_of_the_original_has_no_place_for_functions() -> None:
    assert SAFE.unsupported.keys() == BOTH
    assert "send no tools" in SAFE.unsupported["tools"]
    assert "without --compatible" in COMPATIBLE.unsupported["tools"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["missing", "not"])
def test_missing_and_damaged_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    path = copied(tmp_path)
    (path / name).unlink()
    if damage == "not":
        (path / name).write_text("{")
    with pytest.raises(CheckpointError, match=f"{name} is {damage}"):
        PromptBuilder.from_directory(path)


def test_a_checkpoint_without_a_template_is_refused(tmp_path: Path) -> None:
    path = copied(tmp_path)
    rewrite(path / "tokenizer_config.json", lambda c: c.pop("chat_template"))
    with pytest.raises(CheckpointError, match="no chat template"):
        PromptBuilder.from_directory(path)


@pytest.mark.parametrize("token", ["<|im_tts_start|>", "<|im_audio_end|>", "<|im_end|>"])
def test_a_missing_control_token_is_named(tmp_path: Path, token: str) -> None:
    path = copied(tmp_path)
    rewrite(path / "tokenizer.json", lambda t: t["added_tokens"].remove(_entry(t, token)))
    with pytest.raises(CheckpointError, match="has no token " + token.replace("|", r"\|")):
        PromptBuilder.from_directory(path)


def _entry(tokenizer: dict[str, Any], token: str) -> Any:
    return next(t for t in tokenizer["added_tokens"] if t["content"] == token)


@given(texts | st.just("héllo 你好 👩‍👩‍👧 <think>"), st.data())
def test_streamed_text_equals_the_text_at_once_for_any_chunking(
    text: str, data: st.DataObject
) -> None:
    ids = TOKENIZER.encode(text).ids
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    stream = SAFE.text_stream()
    pieces = [stream.push(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(pieces) + stream.finish() == TOKENIZER.decode(ids)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 610), max_size=30))
def test_streamed_text_of_any_ids_equals_the_tokenizers_own(ids: list[int]) -> None:
    stream = SAFE.text_stream()
    streamed = "".join(stream.push([i]) for i in ids) + stream.finish()
    assert streamed == TOKENIZER.decode([i for i in ids if i < 600], skip_special_tokens=True)


@given(st.text(st.characters(min_codepoint=0x80, codec="utf-8"), min_size=1, max_size=8))
def test_half_a_character_is_never_shown(text: str) -> None:
    stream = SAFE.text_stream()
    shown = ""
    for token_id in TOKENIZER.encode(text).ids:
        shown += stream.push([token_id])
        assert TOKENIZER.normalizer.normalize_str(text).startswith(shown)


def test_an_unfinished_character_is_flushed_once() -> None:
    stream = SAFE.text_stream()
    assert stream.push(TOKENIZER.encode("é").ids[:1]) == ""
    assert (stream.finish(), stream.finish()) == ("\ufffd", "")


def test_units_start_where_the_tokenizer_says() -> None:
    units = UnitVocabulary.from_directory(TINY / "tts")
    tokenizer = Tokenizer.from_file(str(TINY / "tts" / "tokenizer.json"))
    assert (units.units_bias, units.count) == (tokenizer.token_to_id("<|audio_0|>"), 256)
    assert units.to_unit(tokenizer.token_to_id("<|audio_77|>")) == 77
    assert units.to_id(255) == tokenizer.token_to_id("<|audio_255|>")


def test_only_unit_ids_are_in_the_unit_vocabulary() -> None:
    units = UnitVocabulary(units_bias=326, count=256)
    assert [i in units for i in (302, 325, 326, 581, 582)] == [False, False, True, True, False]


@pytest.mark.parametrize("unit", [0, 100])
def test_a_gap_in_the_units_is_refused(tmp_path: Path, unit: int) -> None:
    file = copied(tmp_path) / "tts" / "tokenizer.json"
    token = f"<|audio_{unit}|>"
    rewrite(file, lambda t: t["added_tokens"].remove(_entry(t, token)))
    with pytest.raises(CheckpointError, match=rf"<\|audio_{unit}\|>"):
        UnitVocabulary.from_directory(file.parent)


def test_a_missing_speech_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer.json is missing"):
        UnitVocabulary.from_directory(tmp_path)


def test_importing_the_prompt_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, omnispeech.prompt; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
