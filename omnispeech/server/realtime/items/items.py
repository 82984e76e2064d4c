"""The conversation on the server: its items in order."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from omnispeech.audio.formats import AudioFormat
from omnispeech.config import ServerConfig, TalkConfig
from omnispeech.engine.events import Message
from omnispeech.errors import PromptTooLong
from omnispeech.server.realtime.items.history import history, turns, turns_to_drop
from omnispeech.server.realtime.items.kinds import (
    AssistantMessage,
    FunctionCall,
    FunctionOutput,
    Item,
    MessageItem,
)
from omnispeech.server.realtime.items.reading import read_item
from omnispeech.server.realtime.protocol.client_events import CODES, shown
from omnispeech.server.realtime.protocol.refusals import ProtocolError
from omnispeech.server.realtime.protocol.sizes import MAX_FRAME_BYTES
from omnispeech.server.realtime.settings.field_values import Truncation

ROOT = "root"  # before the first item
REFERENCE = "item_reference"

Verb = Literal["retrieve", "delete", "truncate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one conversation."""

    max_items: int = 1000
    max_text_chars: int = 200_000
    max_audio_s: float = 120.0  # of one item
    max_total_audio_s: float = 800.0  # 32 kB a second
    no_calls: str | None = None  # why the model reads no calls of functions, and no results

    @classmethod
    def of(cls, config: ServerConfig, talk: TalkConfig, no_calls: str | None = None) -> "Limits":
        return cls(
            max_items=config.max_messages,
            max_text_chars=config.max_text_chars,
            max_audio_s=config.max_audio_s,
            max_total_audio_s=talk.talk_audio_s,
            no_calls=no_calls,
        )


class Items:
    """Nothing of it is lost when the model no longer reads it, but at the limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._items: dict[str, Item] = {}
        self._unread: set[str] = set()  # ids of items too old for the model's context
        self._forgotten: list[str] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(tuple(self._items.values()))

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._items

    @property
    def last_id(self) -> str | None:
        return next(reversed(self._items), None)

    def add(
        self, item: Item, previous_item_id: str | None = None, place: str = "item"
    ) -> str | None:
        """previous_item_id: None: at the end; "root": at the start. Gives the id before it.

        place: where the item is in the client's event. Raises ProtocolError.
        """
        previous = self.last_id if previous_item_id is None else previous_item_id
        self._check(item, previous_item_id, place)
        self.make_room(item, place)
        if previous is not None and previous != ROOT and previous not in self._items:
            previous = ROOT  # it had to go for this one
        self._insert(item, previous)
        return None if previous == ROOT else previous

    def previous_of(self, item_id: str) -> str | None:
        before: str | None = None
        for other in self._items:
            if other == item_id:
                return before
            before = other
        raise KeyError(item_id)

    def get(self, item_id: str, verb: Verb = "retrieve") -> Item:
        if item_id not in self._items:
            raise ProtocolError(
                f"item_id={shown(item_id)} is not in the conversation; it may have been deleted",
                code=f"item_{verb}_invalid_item_id",
                param="item_id",
            )
        return self._items[item_id]

    def delete(self, item_id: str) -> None:
        self.get(item_id, "delete")
        del self._items[item_id]
        self._unread.discard(item_id)

    def truncate(self, item_id: str, content_index: int, audio_end_ms: int) -> int:
        """What was not heard is forgotten. Gives where the sound ends now, in ms."""
        item = self.get(item_id, "truncate")
        if not isinstance(item, AssistantMessage) or not item.speech:
            raise ProtocolError(
                f"item_id={shown(item_id)} is no spoken reply of the model; only those can be cut",
                code="item_truncate_invalid_item_id",
                param="item_id",
            )
        if content_index != 0:
            raise ProtocolError(
                f"content_index={content_index}; a reply has one part: send 0",
                param="content_index",
            )
        return item.cut(audio_end_ms)

    def retrieved(self, item_id: str, form: AudioFormat) -> dict[str, Any]:
        """With the sound of users in `form`; that of replies is not kept."""
        item = self.get(item_id)
        sound_bytes = item.seconds * form.rate * form.bytes_per_sample * 4 / 3  # in base64
        if sound_bytes + len(json.dumps(item.described())) > MAX_FRAME_BYTES:
            raise ProtocolError(
                f"item_id={shown(item_id)} has {item.seconds:.0f} s of sound and does not fit into "
                f"a frame of {MAX_FRAME_BYTES} bytes; audio/pcmu as input format takes a sixth",
                code="item_too_large",
                param="item_id",
            )
        return item.retrieved(form) if isinstance(item, MessageItem) else item.described()

    def chosen(self, wire: Iterable[dict[str, Any]], form: AudioFormat) -> tuple[Item, ...]:
        """The items of response.input: new ones, which are not added, and references."""
        chosen = Items(self._limits)
        for number, fields in enumerate(wire):
            place = f"response.input[{number}]"
            chosen.add(self._chosen(fields, form, place), place=place)
        return tuple(chosen)

    def messages(
        self,
        instructions: str,
        items: Iterable[Item] | None = None,
        also: Iterable[Item] = (),
    ) -> tuple[Message, ...]:
        """What the model reads. items: in place of the conversation; also: after it."""
        read = [item for item in self if item.id not in self._unread] if items is None else items
        return history(instructions, [*read, *also])

    def shorten(self, exc: PromptTooLong, truncation: Truncation, instructions: str = "") -> bool:
        """Leaves out the oldest turns for good. False: there is none that may go."""
        preface, found = turns([item for item in self if item.id not in self._unread])
        if not truncation.allowed or len(found) < 2:
            return False
        too_long = 1 - truncation.kept * exc.room / exc.positions
        for turn in found[: turns_to_drop(instructions, preface, found, too_long)]:
            self._unread |= {item.id for item in turn}
        return True

    def make_room(self, item: Item, place: str = "item") -> None:
        """What the model no longer reads goes first. What it says itself is never refused.

        Raises ProtocolError; then nothing went.
        """
        going: set[str] = set()
        unread = (other.id for other in self if other.id in self._unread)
        while reason := self._excess(item, going):
            oldest = next(unread, None)
            if oldest is None and item.status == "in_progress":
                break
            if oldest is None:
                raise ProtocolError(
                    f"{reason}; delete items, or begin another conversation",
                    code="conversation_full",
                    param=place,
                )
            going.add(oldest)
        for item_id in [other.id for other in self if other.id in going]:
            self.delete(item_id)
            self._forgotten.append(item_id)

    def forgotten(self) -> tuple[str, ...]:
        """Ids of the items that had to go for others since this was last asked."""
        ids, self._forgotten = tuple(self._forgotten), []
        return ids

    def _check(self, item: Item, previous_item_id: str | None, place: str) -> None:
        if item.id in self._items or item.id == ROOT:
            raise ProtocolError(
                f"{place}.id={shown(item.id)} is taken; give each item its own id, or none",
                code="item_create_duplicate_item_id",
                param=f"{place}.id",
            )
        if previous_item_id not in (None, ROOT) and previous_item_id not in self._items:
            raise ProtocolError(
                f"previous_item_id={shown(previous_item_id)} is not in the conversation; "
                'send an item\'s id, "root" for the start, or nothing for the end',
                code="item_create_invalid_previous_item_id",
                param="previous_item_id",
            )
        if isinstance(item, FunctionCall | FunctionOutput):
            self._check_calls_are_read(item, place)
        if isinstance(item, FunctionOutput):
            self._check_call(item, previous_item_id, place)

    def _check_calls_are_read(self, item: FunctionCall | FunctionOutput, place: str) -> None:
        """What the model says itself, and is in progress, is never refused."""
        if self._limits.no_calls and item.status != "in_progress":
            kind = item.described()["type"]
            raise ProtocolError(
                f"{place}.type={shown(kind)}; {self._limits.no_calls}",
                code="unsupported",
                param=f"{place}.type",
            )

    def _check_call(self, output: FunctionOutput, previous_item_id: str | None, place: str) -> None:
        before = self._until(previous_item_id)
        calls = {item.call_id for item in before if isinstance(item, FunctionCall)}
        if output.call_id not in calls:
            raise ProtocolError(
                f"{place}.call_id={shown(output.call_id)} is of no call before it",
                code="item_create_invalid_call_id",
                param=f"{place}.call_id",
            )

    def _until(self, item_id: str | None) -> Iterator[Item]:
        """From the first to this one; None: to the last; "root": none."""
        for item in () if item_id == ROOT else self:
            yield item
            if item.id == item_id:
                return

    def _insert(self, item: Item, previous: str | None) -> None:
        following: list[Item] = []
        while self._items and self.last_id != previous:
            following.append(self._items.popitem()[1])
        for each in (item, *reversed(following)):
            self._items[each.id] = each

    def _excess(self, item: Item, going: set[str]) -> str | None:
        """What is too much, with `item` and without those that go."""
        limits = self._limits
        items = (*(other for other in self if other.id not in going), item)
        if len(items) > limits.max_items:
            return f"the conversation has {limits.max_items} items, the most it may have"
        if (length := sum(other.characters for other in items)) > limits.max_text_chars:
            return f"the texts would have {length} characters; allowed: {limits.max_text_chars}"
        if (seconds := sum(other.seconds for other in items)) > limits.max_total_audio_s:
            most = limits.max_total_audio_s
            return f"the sounds would be {seconds:.0f} s; allowed: {most:g} s (talk_audio_s)"
        return None

    def _chosen(self, wire: dict[str, Any], form: AudioFormat, place: str) -> Item:
        if wire.get("type") != REFERENCE:
            return read_item(wire, form, self._limits.max_audio_s, place)
        item_id = wire.get("id")
        if not isinstance(item_id, str) or item_id not in self._items:
            raise ProtocolError(
                f"{place}.id={shown(item_id)} is not in the conversation",
                code=CODES["missing"] if item_id is None else "invalid_value",
                param=f"{place}.id",
            )
        return self._items[item_id]
