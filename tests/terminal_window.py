"""A terminal: a program runs in it, keys are typed, and what stands on its screen is read."""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from unicodedata import east_asian_width

COMMAND = "import sys; from omnispeech.cli import main; sys.exit(main())"
STEER = re.compile(r"\x1b\[(\d*)([A-Za-z])|\r|\n|[^\x1b]", re.DOTALL)


class Window:
    """`omnispeech` with `arguments`. Only what the program may use of a terminal is understood:
    carriage return, line feed, cursor up, erase to the end of the line, colours."""

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], columns: int = 60
    ) -> None:
        self.columns = columns
        self.raw = ""
        self.states: list[str] = []  # screens as they followed one another
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._pid, self._descriptor = pty.fork()
        if self._pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            command = [sys.executable, "-c", COMMAND, *arguments]
            os.execve(sys.executable, command, {**os.environ, "TERM": "xterm", **environment})

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def until(self, seen: Callable[["Window"], object], limit_s: float = 15.0) -> None:
        end_s = time.monotonic() + limit_s
        while not seen(self):
            assert time.monotonic() < end_s, self.text()
            assert self._read() or seen(self), self.text()

    def until_shown(self, words: str, limit_s: float = 15.0) -> None:
        self.until(lambda window: words in window.text(), limit_s)

    def status(self, limit_s: float = 15.0) -> int:
        """Reads until the program ends: its exit status."""
        end_s = time.monotonic() + limit_s
        while self._read():
            assert time.monotonic() < end_s, self.text()
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def _read(self) -> bool:
        if not select.select([self._descriptor], [], [], 0.2)[0]:
            return True
        try:
            data = os.read(self._descriptor, 4096)
        except OSError:  # the other end is closed
            return False
        self.raw += self._decoder.decode(data)
        self.states.append(self.text())
        return bool(data)

    def text(self) -> str:
        """The screen; a row that is too wide goes on in the next one, as on a real one."""
        rows: list[list[str]] = [[]]
        row = column = 0
        for found in STEER.finditer(self.raw):
            number, kind = found.groups()
            if found[0] == "\r":
                column = 0
            elif found[0] == "\n":
                row += 1
            elif kind == "A":
                row -= int(number or 1)
            elif kind == "K":
                del rows[row][column:]
            elif not kind:
                width = 2 if east_asian_width(found[0]) in "WF" else 1
                if column + width > self.columns:
                    row, column = row + 1, 0
                rows += [[] for _ in range(row + 1 - len(rows))]
                rows[row] += [" "] * (column + width - len(rows[row]))
                rows[row][column : column + width] = [found[0], ""][:width]
                column += width
            rows += [[] for _ in range(row + 1 - len(rows))]
        return "\n".join("".join(row).rstrip() for row in rows)
