"""What an examination found, as lines for people and as JSON for scripts."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

from omnispeech.errors import OmniSpeechError

Level = Literal["wrong", "note", "ok"]
MARKS: dict[Level, str] = {"wrong": "WRONG", "note": "note", "ok": "ok"}


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    topic: str
    words: str


def as_text(findings: Sequence[Finding]) -> str:
    """One per line, what is wrong first."""
    ordered = sorted(findings, key=lambda finding: finding.level != "wrong")
    width = max((len(finding.topic) for finding in findings), default=0)
    lines = (f"{MARKS[f.level]:5}  {f.topic:{width}}  {f.words}\n" for f in ordered)
    return "".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps({"good": good(findings), "findings": [asdict(f) for f in findings]}, indent=1)


def good(findings: Sequence[Finding]) -> bool:
    return not any(finding.level == "wrong" for finding in findings)


@contextmanager
def complaints(topic: str, findings: list[Finding]) -> Iterator[None]:
    """What is raised on purpose inside becomes a finding."""
    try:
        yield
    except (OmniSpeechError, OSError) as error:
        findings.append(Finding("wrong", topic, str(error)))


@contextmanager
def log_lines(name: str) -> Iterator[list[str]]:
    """What the logger `name` and those below it say inside, from info on; kept from other logs."""
    lines: list[str] = []
    logger, handler = logging.getLogger(name), _Lines(lines)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())
