"""What clients ask for, event by event."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from omnispeech.errors import OmniSpeechError, Unsupported
from omnispeech.server.realtime import client_events as asked
from omnispeech.server.realtime.answers import Answers
from omnispeech.server.realtime.conversation import Conversation
from omnispeech.server.realtime.hearing import Hearing
from omnispeech.server.realtime.item_reading import Limits, read_item
from omnispeech.server.realtime.refusals import ProtocolError, error_event
from omnispeech.server.realtime.session_settings import SessionSettings
from omnispeech.server.realtime.turn_detection import TurnEvent
from omnispeech.server.realtime.turns import Turns

DETECTION = "session.audio.input.turn_detection"


@dataclass(frozen=True, slots=True)
class Commands:
    """describe: gives the session as it is told. touch: called when somebody does something."""

    conversation: Conversation
    hearing: Hearing
    turns: Turns
    answers: Answers
    limits: Limits
    describe: Callable[[], dict[str, Any]]
    touch: Callable[[], None]

    async def obey(self, event: asked.ClientEvent) -> None:
        """Raises OmniSpeechError; then nothing was done."""
        await OBEY[type(event)](self, event)

    async def listen(self, settings: SessionSettings) -> list[ProtocolError]:
        """Turns are only detected where what that needs is installed."""
        self.conversation.settings = settings
        try:
            await self.hearing.change(settings)
        except Unsupported as exc:
            self.conversation.settings = replace(settings, turn_detection=None)
            return [ProtocolError(str(exc), code="unsupported", param=DETECTION)]
        return []

    def tell_errors(self, refused: list[ProtocolError], event_id: str | None = None) -> None:
        for exc in refused:
            self.conversation.outbox.put(error_event(exc, event_id))

    async def _update(self, event: asked.SessionUpdate) -> None:
        settings, refused = self.conversation.settings.updated(event.session)
        self.turns.forget_guess()
        refused += await self.listen(settings)
        if self.conversation.settings.turn_detection is None:
            self.turns.forget()
        self.tell_errors(refused, event.event_id)
        self.conversation.tell("session.updated", session=self.describe())

    async def _append(self, event: asked.AppendAudio) -> None:
        came_s = asyncio.get_running_loop().time()
        if self.conversation.settings.turn_detection is None:
            self.touch()
        async for turn_event in self.hearing.append(event.audio):
            self.touch()
            self._take_turn(turn_event, came_s)

    def _take_turn(self, event: TurnEvent, came_s: float) -> None:
        try:
            self.turns.take(event, came_s)
        except OmniSpeechError as exc:  # the sound goes on
            self.turns.forget()
            self.conversation.outbox.put(error_event(exc))

    async def _commit(self, event: asked.CommitAudio) -> None:
        self.touch()
        self.turns.forget_guess()
        self.turns.commit(self.hearing.commit())

    async def _clear(self, event: asked.ClearAudio) -> None:
        self.hearing.clear()
        self.turns.forget()
        self.conversation.tell("input_audio_buffer.cleared")

    async def _create_item(self, event: asked.CreateItem) -> None:
        self.touch()
        self.turns.forget_guess()
        form = self.conversation.settings.input_format
        item = await asyncio.to_thread(read_item, event.item, form, self.limits)
        self.conversation.add(item, event.previous_item_id)
        self.conversation.finish(item)

    async def _retrieve_item(self, event: asked.RetrieveItem) -> None:
        form = self.conversation.settings.input_format
        item = await asyncio.to_thread(self.conversation.items.retrieved, event.item_id, form)
        self.conversation.tell("conversation.item.retrieved", item=item)

    async def _delete_item(self, event: asked.DeleteItem) -> None:
        self.turns.forget_guess()
        self.conversation.items.delete(event.item_id)
        self.conversation.tell("conversation.item.deleted", item_id=event.item_id)

    async def _truncate_item(self, event: asked.TruncateItem) -> None:
        self.turns.forget_guess()
        items = self.conversation.items
        end_ms = items.truncate(event.item_id, event.content_index, event.audio_end_ms)
        self.conversation.tell(
            "conversation.item.truncated",
            item_id=event.item_id,
            content_index=event.content_index,
            audio_end_ms=end_ms,
        )

    async def _create_response(self, event: asked.CreateResponse) -> None:
        settings, refused = self.conversation.settings.for_response(event.response)
        if refused:
            self.tell_errors(refused, event.event_id)
            return
        self.answers.check_free(settings)
        chosen = None
        if settings.input is not None:
            form = self.conversation.settings.input_format
            chosen = await asyncio.to_thread(self.conversation.items.chosen, settings.input, form)
        self.touch()
        if not settings.out_of_band:
            self.turns.give_way()
        self.answers.create(settings, chosen)

    async def _cancel_response(self, event: asked.CancelResponse) -> None:
        self.answers.cancel(event.response_id)


OBEY: dict[type, Callable[[Commands, Any], Awaitable[None]]] = {
    asked.SessionUpdate: Commands._update,
    asked.AppendAudio: Commands._append,
    asked.CommitAudio: Commands._commit,
    asked.ClearAudio: Commands._clear,
    asked.CreateItem: Commands._create_item,
    asked.RetrieveItem: Commands._retrieve_item,
    asked.DeleteItem: Commands._delete_item,
    asked.TruncateItem: Commands._truncate_item,
    asked.CreateResponse: Commands._create_response,
    asked.CancelResponse: Commands._cancel_response,
}
