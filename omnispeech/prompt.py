"""Messages -> token ids with audio slots, token ids -> text, unit <-> token id.

The prompt is the chat template's text and `<|im_tts_start|>`, in which every audio is one
`AUDIO_SLOT`. Text of a client never becomes a control token, whatever it contains; only the
compatible mode follows the original, which lets it.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from omnispeech.chat_template import ChatTemplate, Function, Turn, changed_strings, strings_in
from omnispeech.errors import CheckpointError, RequestError, Unsupported
from omnispeech.json_file import read_json

AUDIO_SLOT = -200  # stands in the ids where the vectors of one audio are put
DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant", "tool")

AUDIO_START, AUDIO_END = "<|im_audio_start|>", "<|im_audio_end|>"
AUDIO_MARKER = "<|im_audio|>"  # text only: it is cut out before tokenisation
SPEECH_START, SPEECH_END = "<|im_tts_start|>", "<|im_tts_end|>"
END_OF_TURN = "<|im_end|>"
CONTROL_TOKENS = ("<|im_start|>", END_OF_TURN, AUDIO_START, AUDIO_END, SPEECH_START, SPEECH_END)

NO_TOOLS = "the chat template of this model has no place for functions; send no tools"
NO_CALLS = (
    "the chat template of this model has no place for calls of functions and their results; send "
    "a conversation without them"
)
NO_FUNCTIONS = (
    "the compatible mode has the prompts of the original, which know no functions; send none, or "
    "start the server without --compatible"
)

PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
UNIT_TOKEN = re.compile(r"<\|audio_(\d+)\|>")


@dataclass(frozen=True, slots=True)
class AudioMark:
    """An audio in a message: the n-th mark of a conversation is its n-th audio."""


AUDIO = AudioMark()


@dataclass(frozen=True, slots=True)
class PromptMessage:
    role: str
    parts: tuple[str | AudioMark, ...]
    calls: tuple[Function, ...] = ()  # of the assistant


class PromptBuilder:
    """Builds prompts for one text tokenizer and its chat template."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, *, compatible: bool = False
    ) -> None:
        self._full = tokenizer
        self._template = template
        self._compatible = compatible
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._ids = {token.content: i for i, token in added.items()} | {AUDIO_MARKER: AUDIO_SLOT}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._start_of_control = re.compile(_start_pattern(longest_first))
        self._plain = Tokenizer(tokenizer.model)  # the same model, without added tokens
        self._plain.normalizer = tokenizer.normalizer
        self._plain.pre_tokenizer = tokenizer.pre_tokenizer

    @classmethod
    def from_directory(cls, path: Path, *, compatible: bool = False) -> "PromptBuilder":
        tokenizer = _read_tokenizer(path / "tokenizer.json")
        for token in CONTROL_TOKENS:
            if tokenizer.token_to_id(token) is None:
                raise CheckpointError(f"{path / 'tokenizer.json'} has no token {token}")
        template = ChatTemplate.from_directory(path, tokenizer)
        return cls(tokenizer, template, compatible=compatible)

    def build(
        self, messages: Sequence[PromptMessage], functions: Sequence[Function] = ()
    ) -> list[int]:
        """As many AUDIO_SLOTs as the messages have audios, in the same order.

        Raises Unsupported for what is in `unsupported`.
        """
        try:
            return self._checked_ids(messages, functions)
        except RecursionError as exc:
            raise RequestError("the functions or their arguments are nested too deeply") from exc

    def _checked_ids(
        self, messages: Sequence[PromptMessage], functions: Sequence[Function]
    ) -> list[int]:
        _check_roles(messages)
        self._check_functions(messages, functions)
        for text in (*_texts_of(messages), *strings_in(functions)):
            _check_encodable(text)
        if self._compatible or all(m.role != "system" for m in messages):
            messages = [PromptMessage("system", (DEFAULT_SYSTEM,)), *messages]
        ids = list(
            self._compatible_ids(messages)
            if self._compatible
            else self._ids_of(messages, functions)
        )
        slots = ids.count(AUDIO_SLOT)
        audios = sum(isinstance(part, AudioMark) for m in messages for part in m.parts)
        if slots != audios:
            raise RequestError(
                f"the prompt has places for {slots} audios, the messages have {audios}; "
                f"a text must not contain {AUDIO_MARKER}"
            )
        return ids

    def reply_ids(self, text: str) -> list[int]:
        """What the LLM writes to say `text`, up to the end of its turn."""
        _check_encodable(text)
        ends = (self._ids[SPEECH_END], self._ids[END_OF_TURN])
        return [*self._plain_ids(text), *ends]

    def text_stream(self) -> "TextStream":
        return TextStream(self._full, self._special)

    def decode_text(self, ids: Iterable[int]) -> str:
        """All at once; special tokens are left out."""
        stream = self.text_stream()
        return stream.push(ids) + stream.finish()

    @cached_property
    def unsupported(self) -> dict[str, str]:
        """What a prompt cannot have, "tools" or "tool_calls" (results too) -> what to do."""
        if self._compatible:
            return {"tools": NO_FUNCTIONS, "tool_calls": NO_FUNCTIONS}
        tools = {} if self._template.shows_functions else {"tools": NO_TOOLS}
        return tools if self._template.shows_calls else {**tools, "tool_calls": NO_CALLS}

    def _check_functions(
        self, messages: Sequence[PromptMessage], functions: Sequence[Function]
    ) -> None:
        calls = any(m.calls or m.role == "tool" for m in messages)
        for name, sent in (("tools", bool(functions)), ("tool_calls", calls)):
            if sent and name in self.unsupported:
                raise Unsupported(self.unsupported[name])

    def _plain_ids(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _compatible_ids(self, messages: Sequence[PromptMessage]) -> Iterator[int]:
        rendered = self._rendered(messages, (), lambda text: text)
        for number, piece in enumerate(rendered.split(AUDIO_MARKER)):
            if number:
                yield AUDIO_SLOT
            yield from self._full.encode(piece, add_special_tokens=False).ids

    def _ids_of(
        self, messages: Sequence[PromptMessage], functions: Sequence[Function]
    ) -> Iterator[int]:
        mark = _unused_character([*_texts_of(messages), *strings_in(functions)])

        def broken(text: str) -> str:
            return self._start_of_control.sub(rf"\g<0>{mark}", text)

        # re.split with one group: plain text at even places, control tokens at odd ones
        rendered = self._rendered(messages, functions, broken)
        for place, piece in enumerate(self._control.split(rendered)):
            if place % 2:
                yield self._ids[piece]
            elif piece:
                yield from self._plain_ids(piece.replace(mark, ""))

    def _rendered(
        self,
        messages: Sequence[PromptMessage],
        functions: Sequence[Function],
        guard: Callable[[str], str],
    ) -> str:
        turns = [_turn(message, guard) for message in messages]
        return self._template.render(turns, changed_strings(functions, guard)) + SPEECH_START


class TextStream:
    """Token ids -> text as it becomes readable: a character waits until its last byte is there.

    However the ids are cut, the joined output is that of decoding them all at once.
    """

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join(map(self._bytes, ids)))

    @property
    def holds(self) -> bool:
        """A character has begun and is not complete."""
        return bool(self._utf8.getstate()[0])

    def finish(self) -> str:
        """What is left of a character that was never completed."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if token is None:  # embeddings may have more rows than the tokenizer has tokens
            return b""
        try:
            return bytes(BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token is stored as it is
            return token.encode()


@dataclass(frozen=True, slots=True)
class UnitVocabulary:
    """Where the speech units are in the speech vocabulary: `count` ids from `units_bias` on."""

    units_bias: int
    count: int

    @classmethod
    def from_directory(cls, path: Path) -> "UnitVocabulary":
        """`path` is the `tts` folder of the checkpoint."""
        file = path / "tokenizer.json"
        stored = read_json(file)  # five times faster here than building a Tokenizer
        tokens = dict(stored.get("model", {}).get("vocab", {}))
        tokens |= {token["content"]: token["id"] for token in stored.get("added_tokens", ())}
        ids = {int(m[1]): i for token, i in tokens.items() if (m := UNIT_TOKEN.fullmatch(token))}
        if 0 not in ids:
            raise CheckpointError(f"{file} has no token <|audio_0|>")
        for unit in range(len(ids)):
            if ids.get(unit) != ids[0] + unit:
                raise CheckpointError(
                    f"{file}: <|audio_{unit}|> has the id {ids.get(unit)} instead of "
                    f"{ids[0] + unit}; the units must follow each other"
                )
        return cls(units_bias=ids[0], count=len(ids))

    def __contains__(self, token_id: int) -> bool:
        return 0 <= token_id - self.units_bias < self.count

    def to_unit(self, token_id: int) -> int:
        """Outside 0..count-1 if the id is no unit: ask with `in` where that can be."""
        return token_id - self.units_bias

    def to_id(self, unit: int) -> int:
        return unit + self.units_bias


def _check_roles(messages: Sequence[PromptMessage]) -> None:
    for message in messages:
        if message.role not in ROLES:
            raise RequestError(f"unknown role {message.role!r}; known: {', '.join(ROLES)}")


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise RequestError(
            f"character {exc.start} of a text is the lone surrogate U+{ord(text[exc.start]):04X}; "
            "send valid Unicode"
        ) from exc


def _texts_of(messages: Sequence[PromptMessage]) -> Iterator[str]:
    for message in messages:
        yield from (part for part in message.parts if isinstance(part, str))
        yield from strings_in(message.calls)


def _turn(message: PromptMessage, guard: Callable[[str], str]) -> Turn:
    turn: Turn = {"role": message.role, "content": _content(message.parts, guard)}
    return turn | {"tool_calls": changed_strings(message.calls, guard)} if message.calls else turn


def _content(parts: Sequence[str | AudioMark], guard: Callable[[str], str]) -> str:
    """Neighbouring texts are joined before they are guarded: a token may be cut over two."""
    content, text = "", ""
    for part in parts:
        if isinstance(part, str):
            text += part
        else:
            content += guard(text) + AUDIO_START + AUDIO_MARKER + AUDIO_END
            text = ""
    return content + guard(text)


def _start_pattern(tokens: Sequence[str]) -> str:
    """Matches the first character of every occurrence of a token, overlapping ones too."""
    rests: dict[str, list[str]] = {}
    for token in tokens:
        rests.setdefault(token[0], []).append(re.escape(token[1:]))
    return "|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())


def _unused_character(texts: Iterable[str]) -> str:
    used: set[str] = set().union(*texts)
    for area in PRIVATE_USE:
        for code in area:
            if chr(code) not in used:
                return chr(code)
    raise RequestError("the texts use every private-use character of Unicode; leave one out")


def _read_tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as exc:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{file} is not a tokenizer: {exc}") from exc
    if type(tokenizer.decoder).__name__ != "ByteLevel":
        raise CheckpointError(f"{file} is not a byte-level tokenizer; Qwen2 and Qwen3 have one")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _byte_of_character() -> dict[str, int]:
    """Byte-level vocabularies write a byte as itself if Latin-1 prints it, else from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


BYTE_OF_CHARACTER = _byte_of_character()
