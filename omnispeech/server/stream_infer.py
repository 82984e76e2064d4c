"""POST /stream_infer: frames of PCM16 at 16 kHz in, frames of the same form out."""

import struct
from collections.abc import AsyncIterator, Iterator
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from omnispeech.audio.io import pcm16_from_samples, samples_from_pcm16
from omnispeech.audio.resample import Resampler
from omnispeech.engine.events import INPUT_RATE_HZ, AudioDelta, SpeechEngine
from omnispeech.errors import RequestError
from omnispeech.server.protocol import spoken_turn
from omnispeech.server.reply import Reply, ReplyResponse, begin
from omnispeech.server.window import SAMPLE_BYTES, WINDOW_S, RollingWindow

LENGTH_BYTES = 4
MAX_FRAME_BYTES = WINDOW_S * INPUT_RATE_HZ * SAMPLE_BYTES
REPLY_FRAME_BYTES = INPUT_RATE_HZ // 10 * SAMPLE_BYTES  # 0.1 s
SHORTEST_S = 1.0

WindowSeconds = Annotated[float, Query(ge=SHORTEST_S, le=WINDOW_S, allow_inf_nan=False)]


class FrameReader:
    """Bytes in pieces of any length -> the payloads of length-prefixed frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def push(self, piece: bytes) -> Iterator[bytes]:
        self._buffer += piece
        while len(self._buffer) >= LENGTH_BYTES:
            (length,) = struct.unpack_from("<I", self._buffer)
            if length > MAX_FRAME_BYTES:
                raise RequestError(
                    f"a frame of {length} bytes; send at most {MAX_FRAME_BYTES} ({WINDOW_S} s)"
                )
            end = LENGTH_BYTES + length
            if len(self._buffer) < end:
                return
            yield bytes(self._buffer[LENGTH_BYTES:end])
            del self._buffer[:end]

    def finish(self) -> None:
        if self._buffer:
            raise RequestError(
                f"the body ends inside a frame ({len(self._buffer)} bytes of it came); "
                "send whole frames: 4 bytes of length, then that many bytes"
            )


def stream_infer_routes(engine: SpeechEngine) -> APIRouter:
    router = APIRouter()

    @router.post("/stream_infer")
    async def stream_infer(request: Request, window_s: WindowSeconds = 10.0) -> Response:
        window = await received(request)
        if window.seconds < SHORTEST_S:
            seconds = int(1000 * window.seconds) / 1000  # rounded, too little could read 1.000
            raise RequestError(f"{seconds:.3f} s of audio came; send at least 1 s")
        reply = await begin(request, engine.answer(spoken_turn(window.last(window_s))))
        body = frames(reply, engine.sample_rate_hz)
        return ReplyResponse(body, reply, "application/octet-stream")

    return router


async def received(request: Request) -> RollingWindow:
    window, reader = RollingWindow(), FrameReader()
    async for piece in request.stream():
        for pcm in reader.push(piece):
            window.append(pcm)
    reader.finish()
    return window


async def frames(reply: Reply, rate_hz: int) -> AsyncIterator[bytes]:
    """Frames of 0.1 s, each sent when it is full; the last one may be shorter."""
    resampler = Resampler(rate_hz, INPUT_RATE_HZ)
    waiting = bytearray()
    async for event in reply:
        if isinstance(event, AudioDelta):
            waiting += pcm16_from_samples(resampler.push(samples_from_pcm16(event.pcm)))
        while len(waiting) >= REPLY_FRAME_BYTES:
            yield frame(waiting[:REPLY_FRAME_BYTES])
            del waiting[:REPLY_FRAME_BYTES]
    waiting += pcm16_from_samples(resampler.finish())
    for start in range(0, len(waiting), REPLY_FRAME_BYTES):
        yield frame(waiting[start : start + REPLY_FRAME_BYTES])


def frame(payload: bytearray) -> bytes:
    return struct.pack("<I", len(payload)) + payload
