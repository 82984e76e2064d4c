"""What is said on the streams of the process, whatever these can take."""

import io
import sys
from typing import TextIO, cast


class Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


def open_streams() -> None:
    """A sign that a stream cannot show becomes "?", and a closed stream swallows what is said."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, Nowhere())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def say(*lines: str) -> None:
    """A reader that went away, as `head` does, ends no run."""
    try:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = cast(TextIO, Nowhere())
