"""One spoken turn with the official SDK: python talk.py [question.wav [reply.wav]]

Needs `pip install 'openai[realtime]'`, a WAV file of 16-bit mono sound at 8, 16, 24 or 48 kHz, and
a server; OPENAI_BASE_URL is its address (default http://127.0.0.1:8000/v1), OPENAI_API_KEY its key.
"""

import asyncio
import base64
import os
import sys
import wave
from pathlib import Path

from openai import AsyncOpenAI
from openai.resources.realtime.realtime import AsyncRealtimeConnection

SERVER = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("OPENAI_API_KEY", "none")
REPLY_HZ = 24_000


async def main(question: Path, reply: Path) -> None:
    rate_hz, sound = read(question)
    client = AsyncOpenAI(base_url=SERVER, api_key=KEY)
    async with client, client.realtime.connect(model="omnispeech") as talk:
        await ask(talk, rate_hz, sound)
        with wave.open(str(reply), "wb") as file:
            file.setparams((1, 2, REPLY_HZ, 0, "NONE", ""))
            await answer(talk, file)
    sys.stdout.write(f"\n{reply}\n")


def read(question: Path) -> tuple[int, bytes]:
    with wave.open(str(question)) as file:
        channels, width, rate_hz, frames, *_ = file.getparams()
        if (channels, width) != (1, 2):
            raise SystemExit(
                f"{question}: {channels} channels of {8 * width} bits; give 16-bit mono sound"
            )
        return rate_hz, file.readframes(frames)


async def ask(talk: AsyncRealtimeConnection, rate_hz: int, sound: bytes) -> None:
    heard = {"format": {"type": "audio/pcm", "rate": rate_hz}, "turn_detection": None}
    await talk.session.update(session={"type": "realtime", "audio": {"input": heard}})
    await talk.input_audio_buffer.append(audio=base64.b64encode(sound).decode())
    await talk.input_audio_buffer.commit()
    await talk.response.create()


async def answer(talk: AsyncRealtimeConnection, file: wave.Wave_write) -> None:
    """The text is shown and the sound is written while they come."""
    async for event in talk:
        if event.type == "response.output_audio_transcript.delta":
            sys.stdout.write(event.delta)
            sys.stdout.flush()
        elif event.type == "response.output_audio.delta":
            file.writeframes(base64.b64decode(event.delta))
        elif event.type == "error":
            raise SystemExit(event.error.message)
        elif event.type == "response.done":
            return


if __name__ == "__main__":
    places = [Path(name) for name in sys.argv[1:3]]
    asyncio.run(main(*places, *[Path("question.wav"), Path("reply.wav")][len(places) :]))
