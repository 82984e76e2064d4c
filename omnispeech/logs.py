"""What a server's log looks like, and where it is written.

Each line says whose request it tells of. Sound and text of a conversation stand in none, unless the
level is "debug": errors that quote what a caller sent are told to the caller, and named here.
"""

import io
import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

Form = Literal["text", "json"]
Level = Literal["debug", "info", "warning"]

CONVERSATION: ContextVar[str] = ContextVar("conversation", default="")  # of a talk, else of a turn
PATH: ContextVar[str] = ContextVar("path", default="")  # of the request, as it came


def log_to_stdout(form: Form = "text", level: Level = "info") -> None:
    """To where `docker logs NAME | grep WORD` looks: what goes to stderr passes grep by.

    A sign that the stream cannot show becomes "?".
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("omnispeech").setLevel(level.upper())
    for library in ("httpx", "httpx2"):  # they tell of every request
        logging.getLogger(library).setLevel(logging.WARNING)


class TextLines(logging.Formatter):
    """`2026-11-22 09:30:00,125 INFO [conversation] message`"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(conversation)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        conversation = CONVERSATION.get()
        record.conversation = f"[{conversation}] " if conversation else ""
        return super().format(record)


class JsonLines(logging.Formatter):
    """One object in each line. What `extra={"fields": {...}}` holds becomes members of it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {"conversation": CONVERSATION.get(), "path": PATH.get()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in line.items() if value != ""}, default=str)
