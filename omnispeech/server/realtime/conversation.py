"""What there is of one talk, whoever is connected to it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from omnispeech.server.realtime.items.items import Items
from omnispeech.server.realtime.items.kinds import Item
from omnispeech.server.realtime.outbox import Outbox
from omnispeech.server.realtime.protocol.ids import new_id
from omnispeech.server.realtime.settings.session_settings import SessionSettings


@dataclass(slots=True)
class Conversation:
    """outbox: of the connection; closed, and deaf, while there is none. order: held by whatever is
    heard or obeyed, so that it is one thing after the other."""

    settings: SessionSettings
    items: Items
    outbox: Outbox
    id: str = field(default_factory=lambda: new_id("conv"))
    order: asyncio.Lock = field(default_factory=asyncio.Lock)

    def tell(
        self,
        kind: str,
        of: object = None,
        sent: Callable[[], None] | None = None,
        **fields: Any,
    ) -> None:
        """of, sent: as of Outbox.put"""
        self.outbox.put({"type": kind, **fields}, of, sent)

    def make_room(self, item: Item) -> None:
        """Raises ProtocolError if there is none for it."""
        self.items.make_room(item)
        self._tell_forgotten()

    def _tell_forgotten(self) -> None:
        for forgotten in self.items.forgotten():
            self.tell("conversation.item.deleted", item_id=forgotten)

    def add(self, item: Item, previous_item_id: str | None = None) -> None:
        """Tells it, and also what had to go for it. Raises ProtocolError; then nothing is added."""
        previous = self.items.add(item, previous_item_id)
        self._tell_forgotten()
        told = item.described()
        self.tell("conversation.item.added", previous_item_id=previous, item=told)

    def finish(self, item: Item, of: object = None) -> None:
        """Tells that it is whole, unless the client has deleted it."""
        if item.id in self.items:
            previous = self.items.previous_of(item.id)
            told = item.described()
            self.tell("conversation.item.done", of, previous_item_id=previous, item=told)
