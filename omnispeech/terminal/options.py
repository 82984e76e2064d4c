"""What a conversation in the terminal can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnispeech.audio.io import SAMPLE_RATE_HZ
from omnispeech.client import check_reply
from omnispeech.errors import ConfigError

PIPE = Path("-")
LOWEST_HZ, HIGHEST_HZ = 8_000, 192_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """files: questions; none: the microphone; "-": a pipe of raw sound at rate_hz.
    output: a WAV file, or "-" for raw sound; none: the loudspeaker."""

    server: str
    files: tuple[Path, ...] = ()
    output: Path | None = None
    save: Path | None = None
    push_to_talk: bool = False
    text: bool = False
    rate_hz: int = 24_000
    silence_ms: int = 500
    system: str = ""
    voice: str = "default"
    temperature: float | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError or ClientError."""
        if not LOWEST_HZ <= self.rate_hz <= HIGHEST_HZ:
            raise ConfigError(f"--rate {self.rate_hz}: give {LOWEST_HZ} to {HIGHEST_HZ} Hz")
        if PIPE in self.files and len(self.files) > 1:
            raise ConfigError("a pipe (-) and files cannot be asked together; give one of them")
        if self.push_to_talk and self.files and not self.piped:
            raise ConfigError("each file is a question of its own; leave out --push-to-talk")
        if self.text and self.output:
            raise ConfigError("--text brings no sound to write; leave out --output")
        if self.output and self.output != PIPE:
            check_reply(self.output)

    @property
    def piped(self) -> bool:
        return self.files == (PIPE,)

    def session(self, *, hands_free: bool) -> dict[str, Any]:
        """Of session.update. hands_free: the server finds the turns."""
        detection = {"type": "server_vad", "silence_duration_ms": self.silence_ms}
        heard = {
            "format": {"type": "audio/pcm", "rate": SAMPLE_RATE_HZ},
            "turn_detection": detection if hands_free else None,
        }
        chosen = {"temperature": self.temperature, "max_output_tokens": self.max_new_tokens}
        return {
            "type": "realtime",
            "output_modalities": ["text" if self.text else "audio"],
            "instructions": self.system,
            "audio": {"input": heard, "output": {"voice": self.voice}},
            **{name: value for name, value in chosen.items() if value is not None},
        }
