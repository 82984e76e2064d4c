"""The order in which a server of the Realtime protocol has to tell what happens."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

Event = dict[str, Any]

# one letter for each kind of event in the life of an item of a reply
LETTERS = {
    "response.output_item.added": "A",
    "conversation.item.added": "a",
    "response.content_part.added": "P",
    "response.output_audio_transcript.delta": "w",
    "response.output_audio.delta": "s",
    "response.output_audio.done": "S",
    "response.output_audio_transcript.done": "W",
    "response.output_text.delta": "t",
    "response.output_text.done": "T",
    "response.content_part.done": "p",
    "response.function_call_arguments.delta": "f",
    "response.function_call_arguments.done": "F",
    "conversation.item.done": "d",
    "response.output_item.done": "D",
}
SPOKEN, WRITTEN, CALL = r"Aa?P[ws]*SWpd?D", r"Aa?Pt*Tpd?D", r"Aa?f+Fd?D"
ITEM = re.compile(f"{SPOKEN}|{WRITTEN}|{CALL}")
TEXT = {"response.output_audio_transcript.delta", "response.output_text.delta"}


def check_order(events: Sequence[Event]) -> None:
    """events: all that one connection was told, from its begin."""
    assert events[0]["type"] == "session.created"
    ids = [event["event_id"] for event in events]
    assert len(ids) == len(set(ids))
    for response_id in {event["response"]["id"] for event in events if "response" in event}:
        check_response(response_id, events)
    check_items(events)
    check_turns(events)


def check_response(response_id: str, events: Sequence[Event]) -> None:
    """It is created, its items come in order and each is whole, it is done, and nothing follows."""
    told = [event for event in events if _is_of(event, response_id)]
    added = [event for event in told if event["type"] == "response.output_item.added"]
    assert [event["type"] for event in told].count("response.created") == 1
    assert told[0]["type"] == "response.created"
    assert [event["output_index"] for event in added] == list(range(len(added)))
    if any(event["type"] == "response.done" for event in told):
        assert told[-1]["type"] == "response.done"
        output = told[-1]["response"]["output"]
        assert [item["id"] for item in output] == [event["item"]["id"] for event in added]
        for index, item in enumerate(output):
            check_item(item, index, events)


def check_item(item: dict[str, Any], index: int, events: Sequence[Event]) -> None:
    life = [event for event in events if item["id"] in (_item_id(event), event.get("item_id"))]
    letters = "".join(LETTERS.get(event["type"], "") for event in life)
    assert ITEM.fullmatch(letters), letters
    assert {event.get("output_index", index) for event in life} == {index}
    check_text(item, life)


def check_text(item: dict[str, Any], life: Sequence[Event]) -> None:
    """What was told in pieces begins with what is told at the end."""
    pieces = "".join(event["delta"] for event in life if event["type"] in TEXT)
    for content in item.get("content", ()):
        assert pieces.startswith(content.get("transcript") or content.get("text") or "")


def check_items(events: Sequence[Event]) -> None:
    """Every item is added once, where it says, and done once, the last one's reply aside."""
    order: list[str] = []
    done: Counter[str] = Counter()
    added: list[str] = []
    for event in events:
        match event["type"]:
            case "conversation.item.added":
                before = event["previous_item_id"]
                added.append(event["item"]["id"])
                order.insert(order.index(before) + 1 if before else 0, added[-1])
            case "conversation.item.done":
                done[event["item"]["id"]] += 1
                assert event["item"]["id"] in order
            case "conversation.item.deleted":
                order.remove(event["item_id"])
                del done[event["item_id"]]  # its id may be given again
    assert len(order) == len(set(order))
    assert set(done.values()) <= {1}
    assert set(added) - set(done) <= unfinished(events)


def unfinished(events: Sequence[Event]) -> set[str]:
    """Ids of the items of a reply that is under way when the connection ends, or deleted in it."""
    over = {event["response"]["id"] for event in events if event["type"] == "response.done"}
    items = {
        event["item"]["id"]
        for event in events
        if event["type"] == "response.output_item.added" and event["response_id"] not in over
    }
    return items | {e["item_id"] for e in events if e["type"] == "conversation.item.deleted"}


def check_turns(events: Sequence[Event]) -> None:
    """Speech begins, ends and is committed under one id; one response is active at a time."""
    speaking: str | None = None
    active: str | None = None
    for event in events:
        kind = event["type"]
        if kind == "input_audio_buffer.speech_started":
            assert speaking is None
            speaking = event["item_id"]
        elif kind == "input_audio_buffer.speech_stopped":
            assert speaking == event["item_id"]
        elif kind == "input_audio_buffer.committed":
            assert speaking in (None, event["item_id"])
            speaking = None
        elif kind == "input_audio_buffer.cleared" or _detects_no_turns(event):
            speaking = None
        elif kind == "response.created" and event["response"]["conversation_id"]:
            assert active is None
            active = event["response"]["id"]
        elif kind == "response.done" and event["response"]["id"] == active:
            active = None
            speaking = None if _found_no_room(event["response"]) else speaking


def _found_no_room(response: Event) -> bool:
    """For what was said: it was not committed."""
    error = (response["status_details"] or {}).get("error") or {}
    return error.get("code") == "conversation_full"


def _detects_no_turns(event: Event) -> bool:
    audio = event.get("session", {}).get("audio")
    return audio is not None and audio["input"]["turn_detection"] is None


def _is_of(event: Event, response_id: str) -> bool:
    return response_id in (event.get("response_id"), event.get("response", {}).get("id"))


def _item_id(event: Event) -> str | None:
    """Of those that bring the item itself."""
    whole = ("conversation.item.added", "conversation.item.done")
    whole += ("response.output_item.added", "response.output_item.done")
    return event["item"]["id"] if event["type"] in whole else None
