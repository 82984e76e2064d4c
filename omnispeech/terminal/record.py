"""What was said by both sides, kept in a folder as it is said."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from omnispeech.audio.io import encode_wav
from omnispeech.client import ClientError

TRANSCRIPT = "transcript.txt"


@dataclass(slots=True, eq=False)
class Said:
    """heard_ms: of a reply that was cut; None: all of it was heard."""

    name: str  # "you" or "reply"
    rate_hz: int
    text: str = ""
    pcm: bytearray = field(default_factory=bytearray)
    heard_ms: int | None = None
    at: str = field(default_factory=lambda: time.strftime("%H:%M:%S"))

    @property
    def seconds(self) -> float:
        return len(self.pcm) / 2 / self.rate_hz

    def heard(self) -> bytes:
        if self.heard_ms is None:
            return bytes(self.pcm)
        return bytes(self.pcm[: 2 * (self.heard_ms * self.rate_hz // 1000)])

    def line(self) -> str:
        cut = "" if self.heard_ms is None else f" [cut after {self.heard_ms / 1000:.1f} s]"
        words = " ".join(self.text.split()) or f"[{self.seconds:.1f} s of sound]"
        return f"{self.at} {self.name}: {words}{cut}"


class Record:
    """folder: None keeps nothing on disk."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._entries: list[Said] = []
        if folder is None:
            return
        if (folder / TRANSCRIPT).exists():
            raise ClientError(f"{folder} holds a conversation already; give --save another folder")
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, said: Said) -> Said:
        self._entries.append(said)
        return said

    def write(self, said: Said) -> None:
        """It has changed: its sound, if it has any, and the transcript."""
        if self._folder is None:
            return
        if said.pcm:
            number = self._entries.index(said) + 1
            path = self._folder / f"{number:03d}-{said.name}.wav"
            path.write_bytes(encode_wav(said.heard(), said.rate_hz))
        lines = [entry.line() for entry in self._entries if entry.pcm or entry.text]
        text = "".join(f"{line}\n" for line in lines)
        (self._folder / TRANSCRIPT).write_text(text, encoding="utf-8")
