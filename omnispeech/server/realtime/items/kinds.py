"""What a conversation consists of: messages, calls of functions, and what they gave."""

from base64 import b64encode
from dataclasses import dataclass, field
from typing import Any, Literal

from omnispeech.audio.formats import AudioFormat
from omnispeech.audio.io import pcm16_from_samples, samples_from_pcm16
from omnispeech.audio.resample import Resampler
from omnispeech.engine.events import (
    INPUT_RATE_HZ,
    TOOL,
    Audio,
    Message,
    Samples,
    Text,
    ToolCall,
)
from omnispeech.server.realtime.items.spoken_text import SpokenText
from omnispeech.server.realtime.protocol.ids import new_id

BYTES_PER_SAMPLE = 2  # of sound that is kept

Role = Literal["system", "user", "assistant"]
Status = Literal["in_progress", "completed", "incomplete"]


@dataclass(frozen=True, slots=True)
class Written:
    """A part of a message: text, or the transcript of sound that is not kept."""

    text: str
    kind: Literal["input_text", "output_text", "output_audio"] = "input_text"

    @property
    def characters(self) -> int:
        return len(self.text)

    def described(self) -> dict[str, Any]:
        name = "transcript" if self.kind == "output_audio" else "text"
        return {"type": self.kind, name: self.text}


@dataclass(frozen=True, slots=True, eq=False)
class Spoken:
    """A part of a user's message, kept in half the room that its samples take.

    transcript: for the client alone, the model hears the sound.
    """

    pcm: bytes  # 16-bit little endian, mono, 16 kHz
    transcript: str | None = None

    @classmethod
    def of(cls, samples: Samples, transcript: str | None = None) -> "Spoken":
        """samples: [N] 16 kHz"""
        return cls(pcm16_from_samples(samples), transcript)

    @property
    def samples(self) -> Samples:
        """[N] 16 kHz, the same each time: what the model has read of it is found again."""
        return samples_from_pcm16(self.pcm)

    def described(self) -> dict[str, Any]:
        return {"type": "input_audio", "transcript": self.transcript}

    @property
    def characters(self) -> int:
        return len(self.transcript or "")

    @property
    def seconds(self) -> float:
        return len(self.pcm) / (BYTES_PER_SAMPLE * INPUT_RATE_HZ)

    def encoded(self, form: AudioFormat) -> str:
        """base64"""
        resampler = Resampler(INPUT_RATE_HZ, form.rate)
        pieces = resampler.push(self.samples), resampler.finish()
        return b64encode(b"".join(map(form.encode, pieces))).decode()


Part = Written | Spoken


class _Item:
    """What all items say of themselves."""

    id: str
    status: Status

    def _described(self, kind: str, **fields: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": "realtime.item", "type": kind, "status": self.status}
        return head | fields

    @property
    def characters(self) -> int:
        return 0

    @property
    def seconds(self) -> float:
        """Of sound that is kept."""
        return 0.0


@dataclass(slots=True, eq=False)
class MessageItem(_Item):
    """A message as it was given; the model's own are AssistantMessages."""

    id: str
    role: Role
    parts: tuple[Part, ...]
    status: Status = "completed"

    def described(self) -> dict[str, Any]:
        """Without the sound: see `retrieved`."""
        content = [part.described() for part in self.parts]
        return self._described("message", role=self.role, content=content)

    def retrieved(self, form: AudioFormat) -> dict[str, Any]:
        told = self.described()
        for part, content in zip(self.parts, told["content"], strict=True):
            if isinstance(part, Spoken):
                content["audio"] = part.encoded(form)
        return told

    def message(self) -> Message | None:
        """As the model reads it."""
        content = tuple(
            Audio(part.samples) if isinstance(part, Spoken) else Text(part.text)
            for part in self.parts
            if isinstance(part, Spoken) or part.text
        )
        return Message(self.role, content) if content else None

    @property
    def characters(self) -> int:
        return sum(part.characters for part in self.parts)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts if isinstance(part, Spoken))


def user_sound(samples: Samples, item_id: str | None = None) -> MessageItem:
    """What was said. samples: [N] 16 kHz."""
    return MessageItem(item_id or new_id("item"), "user", (Spoken.of(samples),))


@dataclass(slots=True, eq=False)
class AssistantMessage(_Item):
    """A reply of the model: its text grows while it is in progress; the sound is not kept."""

    id: str
    speech: bool = True
    status: Status = "in_progress"
    spoken: SpokenText = field(default_factory=SpokenText)
    end_ms: int | None = None  # of the sound; None: it was not cut

    @property
    def text(self) -> str:
        """Of a reply that was cut, what was heard."""
        return self.spoken.text if self.end_ms is None else self.spoken.text_until(self.end_ms)

    def cut(self, audio_end_ms: int) -> int:
        """Gives where it ends now: never later than it ended, never beyond its sound."""
        last = round(self.spoken.audio_ms) if self.end_ms is None else self.end_ms
        self.end_ms = max(0, min(audio_end_ms, last))
        return self.end_ms

    def described(self) -> dict[str, Any]:
        kind: Literal["output_audio", "output_text"]
        kind = "output_audio" if self.speech else "output_text"
        empty = self.status == "in_progress" and not self.text
        content = [] if empty else [Written(self.text, kind).described()]
        return self._described("message", role="assistant", content=content)

    def message(self) -> Message | None:
        """None while it is in progress, and if nothing of it was heard."""
        text = "" if self.status == "in_progress" else self.text
        return Message("assistant", (Text(text),)) if text else None

    @property
    def characters(self) -> int:
        return len(self.spoken.text)


@dataclass(slots=True, eq=False)
class FunctionCall(_Item):
    id: str
    call_id: str
    name: str
    arguments: str  # a JSON object
    status: Status = "completed"

    def described(self) -> dict[str, Any]:
        told = {"call_id": self.call_id, "name": self.name, "arguments": self.arguments}
        return self._described("function_call", **told)

    def message(self) -> Message | None:
        if self.status == "in_progress":
            return None
        return Message("assistant", (), (ToolCall(self.name, self.arguments),))

    @property
    def characters(self) -> int:
        return len(self.name) + len(self.arguments)


@dataclass(slots=True, eq=False)
class FunctionOutput(_Item):
    id: str
    call_id: str
    output: str
    status: Status = "completed"

    def described(self) -> dict[str, Any]:
        told = {"call_id": self.call_id, "output": self.output}
        return self._described("function_call_output", **told)

    def message(self) -> Message | None:
        return Message(TOOL, (Text(self.output),))

    @property
    def characters(self) -> int:
        return len(self.output)


Item = MessageItem | AssistantMessage | FunctionCall | FunctionOutput
