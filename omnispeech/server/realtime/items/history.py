"""Items of a conversation -> what the model reads, and what of them to leave out."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from omnispeech.engine.events import Message, Text
from omnispeech.server.realtime.items.kinds import (
    FunctionCall,
    FunctionOutput,
    Item,
    MessageItem,
)

# Positions that are guessed to be taken: their proportions count, the engine knows the sum.
CHARACTERS_PER_POSITION = 3
POSITIONS_PER_SECOND = 12.5  # of sound
POSITIONS_PER_ITEM = 5


def history(instructions: str, items: Iterable[Item]) -> tuple[Message, ...]:
    """The instructions first. Left out: what is in progress or empty, results without calls."""
    messages = [Message("system", (Text(instructions),))] if instructions else []
    calls: set[str] = set()
    for item in items:
        if isinstance(item, FunctionOutput) and item.call_id not in calls:
            continue
        message = item.message()
        if message is None:
            continue
        if isinstance(item, FunctionCall):
            calls.add(item.call_id)
            if messages and messages[-1].role == "assistant":  # one reply, several items of it
                message = _joined(messages.pop(), message)
        messages.append(message)
    return tuple(messages)


def _joined(reply: Message, call: Message) -> Message:
    return replace(reply, tool_calls=reply.tool_calls + call.tool_calls)


def turns(items: Sequence[Item]) -> tuple[list[Item], list[list[Item]]]:
    """(what the client put before all, the turns in order).

    A turn is what users say until they are answered, and all that follows up to their next word;
    so calls and results are in the turn in which they were asked for.
    """
    preface: list[Item] = []
    found: list[list[Item]] = []
    answered = True
    for item in items:
        role = item.role if isinstance(item, MessageItem) else "assistant"
        if role == "system" and not found:
            preface.append(item)
            continue
        if not found or (role == "user" and answered):
            found.append([])
        if role != "system":
            answered = role != "user"
        found[-1].append(item)
    return preface, found


def turns_to_drop(
    instructions: str, preface: Sequence[Item], found: Sequence[Sequence[Item]], too_long: float
) -> int:
    """How many of the oldest turns to leave out, one at least and never the last.

    too_long: what has to go, as a fraction of what the model was to read.
    """
    weights = [sum(map(_positions, turn)) for turn in found]
    before = len(instructions) / CHARACTERS_PER_POSITION + sum(map(_positions, preface))
    excess = too_long * (before + sum(weights)) - weights[0]
    dropped = 1
    while excess > 0 and dropped < len(found) - 1:
        excess -= weights[dropped]
        dropped += 1
    return dropped


def _positions(item: Item) -> float:
    """About; items in progress too."""
    text = item.characters / CHARACTERS_PER_POSITION
    return POSITIONS_PER_ITEM + text + item.seconds * POSITIONS_PER_SECOND
