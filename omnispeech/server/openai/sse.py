"""Server-sent events as OpenAI sends them: lines of data without names."""

import base64
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from omnispeech.errors import OmniSpeechError
from omnispeech.server.openai.refusals import error_object

MEDIA_TYPE = "text/event-stream"
END = b"data: [DONE]\n\n"
PIECE_BYTES = 24_000  # 0.5 s of 16-bit PCM: some readers take no line over 64 kB
WHOLE = 6  # bytes: of samples (2) and of base64 without padding (3)


def data(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()


async def with_error_told(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What goes wrong in the middle is the last event: OpenAI's SDK raises it as APIError."""
    try:
        async for event in events:
            yield event
    except OmniSpeechError as exc:
        yield data({"error": error_object(exc)})


class Base64Pieces:
    """Bytes in any cut -> base64 that can be decoded piece by piece, and joined as well."""

    def __init__(self) -> None:
        self._waiting = b""

    def push(self, new: bytes) -> Iterator[str]:
        held = self._waiting + new
        end = len(held) // WHOLE * WHOLE
        self._waiting = held[end:]
        for start in range(0, end, PIECE_BYTES):
            yield base64.b64encode(held[start : min(start + PIECE_BYTES, end)]).decode()

    def finish(self) -> Iterator[str]:
        if self._waiting:
            yield base64.b64encode(self._waiting).decode()
            self._waiting = b""
