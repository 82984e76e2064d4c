"""A chat template, rendered as transformers does it: in its sandbox, with its helpers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from omnispeech.errors import CheckpointError, RequestError
from omnispeech.json_file import read_json

Turn = dict[str, Any]  # role, content; of the assistant, tool_calls
Function = dict[str, Any]  # in the shape of OpenAI: {"type": "function", "function": {...}}


class ChatTemplate:
    def __init__(self, chat: Any) -> None:
        """chat: a tokenizer of transformers that has a template."""
        self._chat = chat

    @classmethod
    def from_directory(cls, path: Path, tokenizer: Tokenizer) -> "ChatTemplate":
        """Raises CheckpointError if there is none."""
        from transformers import PreTrainedTokenizerFast

        config = read_json(path / "tokenizer_config.json")
        chat = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=tokenizer,
            chat_template=template_text(path, config),
            **special_token_names(config),
        )
        return cls(chat)

    def render(self, turns: Sequence[Turn], functions: Sequence[Function] = ()) -> str:
        """The text up to where the reply begins; the reply does not think aloud.

        Raises RequestError if the template refuses these turns.
        """
        from jinja2 import TemplateError

        try:
            return str(
                self._chat.apply_chat_template(
                    list(turns),
                    tools=list(functions) or None,
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=False,
                )
            )
        except TemplateError as exc:
            raise RequestError(f"the chat template refuses these messages: {exc}") from exc

    @cached_property
    def shows_functions(self) -> bool:
        """Many templates leave out without a word what they have no place for."""
        function = {"name": "probe_name", "description": "", "parameters": {"type": "object"}}
        return self._shows(["probe_name"], [], [{"type": "function", "function": function}])

    @cached_property
    def shows_calls(self) -> bool:
        """Both a call of the assistant and what came of it."""
        call = {"type": "function", "function": {"name": "probe_name", "arguments": {}}}
        turns: list[Turn] = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "probe_result"},
        ]
        return self._shows(["probe_name", "probe_result"], turns, [])

    def _shows(
        self, words: Sequence[str], turns: Sequence[Turn], functions: Sequence[Function]
    ) -> bool:
        before = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
        try:
            text = self.render([*before, *turns], functions)
        except (RequestError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
            return False  # whatever a template does to what it does not know
        return all(word in text for word in words)


def strings_in(value: Any) -> Iterator[str]:
    """Every string of a JSON value, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.items():
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


def changed_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same JSON value with `change` of every string in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): changed_strings(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [changed_strings(item, change) for item in value]
    return value


def template_text(path: Path, config: dict[str, Any]) -> str:
    """transformers 5 writes a file of its own; older versions write into the configuration."""
    jinja, legacy = path / "chat_template.jinja", path / "chat_template.json"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    template = (read_json(legacy) if legacy.is_file() else config).get("chat_template")
    if isinstance(template, list):  # several by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    if not isinstance(template, str):
        raise CheckpointError(
            f"{path} has no chat template, neither in tokenizer_config.json nor in {jinja.name}"
        )
    return template


def special_token_names(config: dict[str, Any]) -> dict[str, str]:
    """Those a template may ask for."""
    stored = {name: config.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    names = {n: t["content"] if isinstance(t, dict) else t for n, t in stored.items()}
    return {f"{name}_token": token for name, token in names.items() if token}
