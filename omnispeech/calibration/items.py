"""Calibration data on disk: conversations, spoken ones too, and plain texts.

JSONL has one of them per line:

    {"text": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

and the content of a message may be a list of parts:

    [{"type": "audio", "path": "a.wav", "transcript": "..."}, {"type": "text", "text": "..."}]

Paths start at the file that names them. A transcript is optional: it is read where sound cannot be
heard. A directory may hold such files, texts (*.txt, paragraphs separated by an empty line) and
sound files, each a question; `name.txt` beside `name.wav` is the reply.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnispeech.audio.io import decode_audio
from omnispeech.audio.resample import Samples
from omnispeech.errors import AudioError, ConfigError

SOUND_FILES = (".wav", ".flac", ".ogg", ".mp3")
ROLES = ("system", "user", "assistant")
MAX_AUDIO_S = 120.0
SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True, slots=True)
class Sound:
    path: Path
    transcript: str | None = None

    def samples(self) -> Samples:
        """[N] float32, mono, 16 kHz. Raises ConfigError, with the path."""
        try:
            return decode_audio(self.path.read_bytes(), max_seconds=MAX_AUDIO_S)
        except (AudioError, OSError) as exc:
            raise ConfigError(f"{self.path}: {exc}") from exc


@dataclass(frozen=True, slots=True)
class Turn:
    role: str
    parts: tuple[str | Sound, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    turns: tuple[Turn, ...]  # one of them at least is the user's
    source: str  # file:line

    @property
    def sounds(self) -> list[Sound]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, Sound)]


@dataclass(frozen=True, slots=True)
class PlainText:
    text: str
    source: str  # file:line


Item = Conversation | PlainText


def read_items(path: Path) -> list[Item]:
    """Of a JSONL, text or sound file, or of a directory of them, its folders included.

    Raises ConfigError, with file and line, for what cannot be read. Sound is decoded later.
    """
    if path.is_dir():
        items = _of_directory(path)
    elif path.is_file():
        items = list(_of_file(path))
    else:
        raise ConfigError(f"{path} does not exist; give a directory, or a {_allowed()} file")
    if not items:
        raise ConfigError(f"{path} holds no calibration data; allowed: {_allowed()} files")
    return items


def shipped_items() -> list[Item]:
    """The set that comes with the project: synthesised questions, conversations, long texts."""
    return read_items(SHIPPED / "conversations.jsonl")


def _allowed() -> str:
    return ", ".join((".jsonl", ".txt", *SOUND_FILES))


def _of_directory(path: Path) -> list[Item]:
    """A sound file that a JSONL names is not taken a second time."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    items = [item for file in files if file.suffix == ".jsonl" for item in _of_jsonl(file)]
    named = {
        sound.path.resolve()
        for item in items
        if isinstance(item, Conversation)
        for sound in item.sounds
    }
    replies = {f.with_suffix(".txt") for f in files if f.suffix.lower() in SOUND_FILES}
    skipped = {file for file in files if file.resolve() in named} | replies
    rest = [f for f in files if f.suffix != ".jsonl" and f not in skipped and _is_known(f)]
    return items + [item for file in rest for item in _of_file(file)]


def _is_known(file: Path) -> bool:
    return file.suffix.lower() in (*SOUND_FILES, ".txt")


def _of_file(file: Path) -> Iterator[Item]:
    if file.suffix == ".jsonl":
        return _of_jsonl(file)
    if file.suffix.lower() == ".txt":
        return _of_text(file)
    if file.suffix.lower() in SOUND_FILES:
        return iter([_of_sound(file)])
    raise ConfigError(f"{file} is no calibration data; allowed: {_allowed()} files")


def _of_text(file: Path) -> Iterator[Item]:
    text, line = _read_text(file), 1
    for place, piece in enumerate(re.split(r"(\n\s*\n)", text)):
        if place % 2 == 0 and piece.strip():
            yield PlainText(piece.strip(), f"{file}:{line}")
        line += piece.count("\n")


def _of_sound(file: Path) -> Conversation:
    turns = [Turn("user", (Sound(file),))]
    reply = file.with_suffix(".txt")
    if reply.is_file() and (text := _read_text(reply).strip()):
        turns.append(Turn("assistant", (text,)))
    return Conversation(tuple(turns), f"{file}:1")


def _of_jsonl(file: Path) -> Iterator[Item]:
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if line.strip():
            try:
                yield _item(json.loads(line), file, f"{file}:{number}")
            except ValueError as exc:
                raise ConfigError(f"{file}:{number} is not valid JSON: {exc}") from exc


def _item(value: Any, file: Path, where: str) -> Item:
    if isinstance(value, dict) and value.keys() == {"text"}:
        return PlainText(_text(value["text"], f"{where}: text"), where)
    if not isinstance(value, dict) or value.keys() != {"messages"}:
        raise ConfigError(f'{where}: allowed: an object with "messages" or "text", nothing else')
    messages = value["messages"]
    if not isinstance(messages, list):
        raise ConfigError(f"{where}: messages is {type(messages).__name__}; allowed: a list")
    turns = tuple(_turn(m, file, f"{where}: message {n}") for n, m in enumerate(messages, 1))
    if all(turn.role != "user" for turn in turns):
        raise ConfigError(f"{where}: no message is the user's; a conversation has one or more")
    return Conversation(turns, where)


def _turn(value: Any, file: Path, where: str) -> Turn:
    message = _object(value, {"role", "content"}, set(), where)
    if message["role"] not in ROLES:
        raise ConfigError(f"{where}: role {message['role']!r}; allowed: {', '.join(ROLES)}")
    content = message["content"]
    if not isinstance(content, list) or not content:
        return Turn(message["role"], (_text(content, f"{where}: content"),))
    turn = Turn(message["role"], tuple(_part(part, file, where) for part in content))
    if turn.role != "user" and any(isinstance(part, Sound) for part in turn.parts):
        raise ConfigError(f"{where}: sound of the {turn.role}; only the user is heard")
    return turn


def _part(value: Any, file: Path, where: str) -> str | Sound:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        part = _object(value, {"type", "text"}, set(), where)
        return _text(part["text"], f"{where}: text")
    if kind != "audio":
        raise ConfigError(f"{where}: a part of the type {kind!r}; allowed: text, audio")
    part = _object(value, {"type", "path"}, {"transcript"}, where)
    path = file.parent / _text(part["path"], f"{where}: path")
    if not path.is_file():
        raise ConfigError(f"{where}: {path} does not exist; paths start at {file.parent}")
    transcript = part.get("transcript")
    return Sound(path, None if transcript is None else _text(transcript, f"{where}: transcript"))


def _object(
    value: Any, needed: Collection[str], more: Collection[str], where: str
) -> Mapping[str, Any]:
    """With all of `needed`, and no keys but those and `more`."""
    keys = value.keys() if isinstance(value, dict) else set()
    if not set(needed) <= keys or keys - set(needed) - set(more):
        raise ConfigError(
            f"{where}: keys {', '.join(sorted(keys)) or 'none'}; needed: "
            f"{', '.join(sorted(needed))}" + (f"; optional: {', '.join(more)}" if more else "")
        )
    return dict(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where} is {value!r:.60}; allowed: text that is not empty")
    return value


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{file} cannot be read as UTF-8 text: {exc}") from exc
