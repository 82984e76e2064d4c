"""What users say, written down beside the talk."""

import asyncio
from dataclasses import replace
from typing import Any

from omnispeech.errors import OmniSpeechError
from omnispeech.server.admission import Admission
from omnispeech.server.realtime.conversation import Conversation
from omnispeech.server.realtime.items.kinds import MessageItem, Spoken
from omnispeech.server.realtime.protocol.refusals import response_error
from omnispeech.server.transcription import transcribe

KIND = "conversation.item.input_audio_transcription"


class Transcripts:
    """One at a time, in order; none of them waits for a reply, and no reply for them."""

    def __init__(self, engine: Admission, conversation: Conversation) -> None:
        self._engine = engine
        self._conversation = conversation
        self._order = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, item: MessageItem) -> None:
        """item: with one part, which is sound"""
        task = asyncio.create_task(self._tell(item))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _tell(self, item: MessageItem) -> None:
        place: dict[str, Any] = {"item_id": item.id, "content_index": 0}
        try:
            async with self._order:
                text, seconds = await self._written(item)
        except OmniSpeechError as exc:
            self._conversation.tell(f"{KIND}.failed", **place, error=response_error(exc))
            return
        usage = {"type": "duration", "seconds": seconds}
        self._conversation.tell(f"{KIND}.delta", **place, delta=text)
        self._conversation.tell(f"{KIND}.completed", **place, transcript=text, usage=usage)

    async def _written(self, item: MessageItem) -> tuple[str, float]:
        (part,) = item.parts
        assert isinstance(part, Spoken), part
        text = await transcribe(self._engine, part.samples)
        item.parts = (replace(part, transcript=text),)
        return text, part.seconds
