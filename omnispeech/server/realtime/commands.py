"""What clients ask for, event by event."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from omnispeech.errors import OmniSpeechError, Unsupported
from omnispeech.server.realtime.conversation import Conversation
from omnispeech.server.realtime.hearing.hearing import Hearing
from omnispeech.server.realtime.hearing.turn_detection import TurnEvent
from omnispeech.server.realtime.items.reading import read_item
from omnispeech.server.realtime.protocol.client_events import (
    AppendAudio,
    CancelResponse,
    ClearAudio,
    ClientEvent,
    CommitAudio,
    CreateItem,
    CreateResponse,
    DeleteItem,
    RetrieveItem,
    SessionUpdate,
    TruncateItem,
)
from omnispeech.server.realtime.protocol.refusals import ProtocolError, error_event
from omnispeech.server.realtime.replies.answers import Answers
from omnispeech.server.realtime.settings.session_settings import SessionSettings
from omnispeech.server.realtime.turns import Turns

DETECTION = "session.audio.input.turn_detection"


@dataclass(frozen=True, slots=True)
class Commands:
    """describe: gives the session as it is told. touch: called when somebody does something."""

    conversation: Conversation
    hearing: Hearing
    turns: Turns
    answers: Answers
    max_audio_s: float  # of one sound
    describe: Callable[[], dict[str, Any]]
    touch: Callable[[], None]

    async def obey(self, event: ClientEvent) -> None:
        """Raises OmniSpeechError; then nothing has changed for the client."""
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

    async def _update(self, event: SessionUpdate) -> None:
        settings, refused = self.conversation.settings.updated(event.session)
        self.turns.forget_guess()
        refused += await self.listen(settings)
        if self.conversation.settings.turn_detection is None:
            self.turns.forget()
        self.tell_errors(refused, event.event_id)
        self.conversation.tell("session.updated", session=self.describe())

    async def _append(self, event: AppendAudio) -> None:
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

    async def _commit(self, event: CommitAudio) -> None:
        self.touch()
        self.turns.commit(self.hearing.held())
        self.turns.forget_guess()
        self.hearing.clear()

    async def _clear(self, event: ClearAudio) -> None:
        self.hearing.clear()
        self.turns.forget()
        self.conversation.tell("input_audio_buffer.cleared")

    async def _create_item(self, event: CreateItem) -> None:
        self.touch()
        self.turns.forget_guess()
        form = self.conversation.settings.input_format
        item = await asyncio.to_thread(read_item, event.item, form, self.max_audio_s)
        self.conversation.add(item, event.previous_item_id)
        self.conversation.finish(item)

    async def _retrieve_item(self, event: RetrieveItem) -> None:
        form = self.conversation.settings.input_format
        item = await asyncio.to_thread(self.conversation.items.retrieved, event.item_id, form)
        self.conversation.tell("conversation.item.retrieved", item=item)

    async def _delete_item(self, event: DeleteItem) -> None:
        self.turns.forget_guess()
        self.conversation.items.delete(event.item_id)
        self.conversation.tell("conversation.item.deleted", item_id=event.item_id)

    async def _truncate_item(self, event: TruncateItem) -> None:
        self.turns.forget_guess()
        items = self.conversation.items
        end_ms = items.truncate(event.item_id, event.content_index, event.audio_end_ms)
        self.conversation.tell(
            "conversation.item.truncated",
            item_id=event.item_id,
            content_index=event.content_index,
            audio_end_ms=end_ms,
        )

    async def _create_response(self, event: CreateResponse) -> None:
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

    async def _cancel_response(self, event: CancelResponse) -> None:
        self.answers.cancel(event.response_id)


OBEY: dict[type, Callable[[Commands, Any], Awaitable[None]]] = {
    SessionUpdate: Commands._update,
    AppendAudio: Commands._append,
    CommitAudio: Commands._commit,
    ClearAudio: Commands._clear,
    CreateItem: Commands._create_item,
    RetrieveItem: Commands._retrieve_item,
    DeleteItem: Commands._delete_item,
    TruncateItem: Commands._truncate_item,
    CreateResponse: Commands._create_response,
    CancelResponse: Commands._cancel_response,
}
