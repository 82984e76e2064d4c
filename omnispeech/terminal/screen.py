"""What the person sees: transcripts that stay, and below them one line that is drawn in place."""

import os
import shutil
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

REPLY = "reply"
COLOURS = {"you": "36", REPLY: "", "note": "2"}  # of ANSI
BAR = 20  # cells
TAB = "    "


class Screen:
    """Plain lines, for a file or a pipe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._name = ""  # whose text is growing
        self._waiting: list[tuple[str, str]] = []

    def line(self, text: str, kind: str = "note") -> None:
        """While a text is growing it waits for its end."""
        if self._name:
            self._waiting.append((text, kind))
        else:
            self._whole(clean(text), kind)

    def begin(self, name: str) -> None:
        """A text that will grow; `name` stands before it."""
        self.end()
        self._name = name
        self._grow(f"{name}: ")

    def grow(self, text: str) -> None:
        self._grow(clean(text))

    def end(self) -> None:
        if self._name:
            self._name = ""
            self._close()
        waiting, self._waiting = self._waiting, []
        for text, kind in waiting:
            self.line(text, kind)

    def status(self, state: str, level: float, seconds: float) -> None:
        """level: in [0, 1]; seconds: since the state began. Not shown in plain lines."""

    def leave(self) -> None:
        """The last line of the screen is free for others."""
        self.end()

    def _whole(self, text: str, kind: str) -> None:
        self._write(f"{text}\n")

    def _grow(self, text: str) -> None:
        self._write(text)

    def _close(self) -> None:
        self._write("\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class LiveScreen(Screen):
    """For a terminal: rows are broken here, so that the last ones can be drawn again."""

    def __init__(self, stream: TextIO, *, colour: bool, columns: Callable[[], int]) -> None:
        super().__init__(stream)
        self._colour = colour
        self._columns = columns
        self._row: str | None = None  # the last one of the growing text
        self._status = ""

    def status(self, state: str, level: float, seconds: float) -> None:
        filled = round(BAR * level)
        bar = "#" * filled + "." * (BAR - filled)
        status = cut(f"{state}  [{bar}]  {seconds:.1f} s", self._columns() - 1)
        if status != self._status:
            self._status = status
            self._write("\r" + self._drawn_status())

    def leave(self) -> None:
        super().leave()
        self._status = ""
        self._write("\r\x1b[K")

    def _whole(self, text: str, kind: str) -> None:
        rows = [self._painted(row, kind) for row in wrapped(text, self._columns() - 1)]
        self._draw(rows)

    def _grow(self, text: str) -> None:
        *whole, row = wrapped((self._row or "") + text, self._columns() - 1)
        self._draw([self._painted(line, REPLY) for line in whole], row)

    def _close(self) -> None:
        self._draw([self._painted(self._row or "", REPLY)], None)

    def _draw(self, rows: list[str], last: str | None = None) -> None:
        """Where the growing row and the status were: rows that stay, then those two."""
        up = "" if self._row is None else "\x1b[1A"
        self._row = last
        if last is not None:
            rows = [*rows, self._painted(last, REPLY)]
        text = "".join(f"{row}\x1b[K\n" for row in rows)
        self._write(f"\r{up}{text}{self._drawn_status()}")

    def _drawn_status(self) -> str:
        return f"{self._painted(self._status, 'note')}\x1b[K"

    def _painted(self, text: str, kind: str) -> str:
        code = COLOURS[kind]
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and code and text else text


def screen_on(stream: TextIO) -> Screen:
    """Live on a terminal, without colours if NO_COLOR says so."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return Screen(stream)

    def columns() -> int:
        with suppress(OSError):
            return max(20, os.get_terminal_size(stream.fileno()).columns)
        return shutil.get_terminal_size().columns

    return LiveScreen(stream, colour=not os.environ.get("NO_COLOR"), columns=columns)


def clean(text: str) -> str:
    """Without characters that steer a terminal: the text comes from elsewhere."""
    spaced = text.replace("\t", TAB).replace("\r\n", " ").replace("\n", " ")
    return "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def cells(character: str) -> int:
    """How many columns of a terminal it takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def cut(text: str, columns: int) -> str:
    """Its beginning, as far as it fits."""
    width = 0
    for at, character in enumerate(text):
        width += cells(character)
        if width > columns:
            return text[:at]
    return text


def wrapped(text: str, columns: int) -> list[str]:
    """Rows that fit, broken at spaces where there are any; one at least."""
    rows = []
    while (row := cut(text, columns)) != text:
        space = row.rfind(" ")
        end = space if space > 0 else max(1, len(row))
        rows.append(text[:end].rstrip())
        text = text[end:].removeprefix(" ")
    return [*rows, text]
