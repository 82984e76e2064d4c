"""Texts and conversations -> token ids, with the tokenizer and chat template of any text model."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from omnispeech.calibration.items import Conversation, Turn
from omnispeech.chat_template import special_token_names, template_text
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.json_file import read_json


class TextTokens:
    def __init__(self, directory: Path) -> None:
        """`directory` has a tokenizer.json, and a chat template if the model can chat.

        Raises CheckpointError if the tokenizer is missing or damaged.
        """
        self._directory = directory
        self._tokenizer = _read_tokenizer(directory / "tokenizer.json")
        self._chat: Any = None
        self._has_template = _has_template(directory)
        self.size = self._tokenizer.get_vocab_size()
        added = self._tokenizer.get_added_tokens_decoder()
        self.control = frozenset(added)  # ids that no plain text has

    def of_text(self, text: str) -> list[int]:
        """As the model reads a whole text: a first token that it always wants is there."""
        return self._tokenizer.encode(text).ids

    def of_piece(self, text: str) -> list[int]:
        """Of text that goes on from something, or that a template made."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def of_conversation(self, conversation: Conversation) -> list[int]:
        """Through the chat template; without one, the texts line by line.

        Raises ConfigError if the template refuses it, or if it has sound without a transcript.
        """
        turns = [{"role": t.role, "content": _words(t, conversation)} for t in conversation.turns]
        if not self._has_template:
            return self.of_text("\n".join(turn["content"] for turn in turns))
        return self.of_piece(self._render(turns, conversation))

    def _render(self, turns: list[dict[str, str]], conversation: Conversation) -> str:
        from jinja2 import TemplateError

        self._chat = self._chat or _chat(self._directory, self._tokenizer)
        try:
            return str(
                self._chat.apply_chat_template(
                    turns,
                    tokenize=False,
                    add_generation_prompt=turns[-1]["role"] != "assistant",
                    enable_thinking=False,
                )
            )
        except TemplateError as exc:
            raise ConfigError(
                f"{conversation.source}: the chat template refuses it: {exc}"
            ) from exc


def _words(turn: Turn, conversation: Conversation) -> str:
    words = [part if isinstance(part, str) else part.transcript for part in turn.parts]
    if None in words:
        raise ConfigError(
            f"{conversation.source}: sound without a transcript cannot be read as text; add "
            '"transcript" to it, or calibrate a speech model with it'
        )
    return "".join(word for word in words if word)


def _read_tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; texts cannot be tokenized without it")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as exc:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{file} is not a tokenizer: {exc}") from exc
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _config(directory: Path) -> dict[str, Any]:
    file = directory / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def _has_template(directory: Path) -> bool:
    files = ("chat_template.jinja", "chat_template.json")
    return any((directory / name).is_file() for name in files) or bool(
        _config(directory).get("chat_template")
    )


def _chat(directory: Path, tokenizer: Tokenizer) -> Any:
    """The template as transformers renders it: in its sandbox, with its helpers."""
    from transformers import PreTrainedTokenizerFast

    config = _config(directory)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        chat_template=template_text(directory, config),
        **special_token_names(config),
    )
