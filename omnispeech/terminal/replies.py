"""What the model says: its text is shown, its sound is played."""

import time
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnispeech.audio.io import encode_wav
from omnispeech.terminal.link import Event, Link
from omnispeech.terminal.player import BYTES_A_MS, RATE_HZ, Player
from omnispeech.terminal.record import Record, Said
from omnispeech.terminal.screen import REPLY, Screen
from omnispeech.terminal.timing import Timing

CUT = "cut"


@dataclass(slots=True)
class Reply:
    """status: of the response, "cut" if it was silenced; empty while it comes."""

    timing: Timing
    said: Said
    response: str = ""
    item: str = ""
    status: str = ""
    message: str = ""  # why it failed
    remembered: str | None = None  # by the model, of a reply that was cut

    @property
    def begun(self) -> bool:
        return bool(self.said.text or self.said.pcm)


@dataclass(slots=True)
class Replies:
    """to_files: each spoken reply becomes reply-N.wav, for nothing plays it."""

    link: Link
    player: Player
    screen: Screen
    record: Record
    to_files: bool = False
    on_done: Callable[[Reply], None] = lambda reply: None
    awaited: Timing | None = None  # of a question that no reply was begun for
    reply: Reply | None = None  # under way
    _of_item: dict[str, Reply] = field(default_factory=dict)
    _spoken: int = 0

    def handlers(self) -> dict[str, Callable[[Event], None]]:
        return {
            "response.created": self._begin,
            "response.output_item.added": self._add,
            "response.output_audio_transcript.delta": self._text,
            "response.output_text.delta": self._text,
            "response.output_audio.delta": self._sound,
            "response.done": self._done,
            "conversation.item.truncated": self._truncated,
            "conversation.item.retrieved": self._retrieved,
        }

    @property
    def thinking(self) -> bool:
        return self.awaited is not None or (self.reply is not None and not self.reply.begun)

    @property
    def speaking(self) -> bool:
        return self.reply is not None or self.player.active

    def interrupt(self) -> bool:
        """The person wants it to stop. False if there is nothing to stop."""
        if not (self.speaking or self.awaited):
            return False
        if self.reply or self.awaited:
            named = {"response_id": self.reply.response} if self.reply else {}
            self.link.send("response.cancel", **named)
        self.awaited = None
        self.silence()
        return True

    def silence(self) -> None:
        """Nothing more is heard; the server is told how much of it was."""
        for item, heard_ms in self.player.stop():
            self._cut(self._of_item[item], heard_ms)
        if self.reply and not self.reply.status:
            self.reply.status = CUT

    def forget(self) -> Reply | None:
        """The server has ended what was under way, and it will tell nothing more of it."""
        reply, self.reply, self.awaited = self.reply, None, None
        self.screen.end()
        return reply

    def settle(self, reply: Reply) -> None:
        """The connection was lost in it: what came counts as heard."""
        if reply.item:
            self._cut(reply, len(reply.said.pcm) // BYTES_A_MS)

    def _begin(self, event: Event) -> None:
        timing, self.awaited = self.awaited or Timing(time.monotonic()), None
        said = self.record.add(Said(REPLY, RATE_HZ))
        self.reply = Reply(timing, said, event["response"]["id"])

    def _add(self, event: Event) -> None:
        item = event["item"]
        if self.reply and item["type"] == "message":
            self.reply.item = item["id"]
            self._of_item[item["id"]] = self.reply

    def _text(self, event: Event) -> None:
        reply = self._of_item[event["item_id"]]
        if reply.status:
            return
        reply.timing.text(time.monotonic())
        if not reply.said.text:
            self.screen.begin(REPLY)
        reply.said.text += event["delta"]
        self.screen.grow(event["delta"])

    def _sound(self, event: Event) -> None:
        reply, pcm = self._of_item[event["item_id"]], b64decode(event["delta"])
        if reply.status:
            return
        reply.timing.audio(time.monotonic(), len(pcm) / BYTES_A_MS / 1000)
        reply.said.pcm += pcm
        self.player.push(reply.item, pcm)

    def _done(self, event: Event) -> None:
        reply, self.reply = self.reply, None
        if reply is None:
            return
        response = event["response"]
        cut = reply.status == CUT
        reply.status = CUT if cut else response["status"]
        reply.timing.done_s = time.monotonic()
        if response["status"] == "failed":
            details = response.get("status_details") or {}
            reply.message = details.get("error", {}).get("message", "the reply failed")
        self.screen.end()
        self._report(reply)
        self.on_done(reply)

    def _report(self, reply: Reply) -> None:
        self.record.write(reply.said)
        if reply.message:
            return
        place = self._written(reply.said)
        self.screen.line(f"{place}{ended(reply)}{reply.timing.report()}")

    def _written(self, said: Said) -> str:
        """Where it lies, to stand before what is told of it."""
        self._spoken += 1
        if not (self.to_files and said.pcm):
            return ""
        path = Path(f"reply-{self._spoken}.wav")
        path.write_bytes(encode_wav(bytes(said.pcm), said.rate_hz))
        return f"{path}: "

    def _cut(self, reply: Reply, heard_ms: int) -> None:
        reply.said.heard_ms = heard_ms
        self.record.write(reply.said)
        place: dict[str, Any] = {"item_id": reply.item, "content_index": 0}
        self.link.send("conversation.item.truncate", **place, audio_end_ms=heard_ms)
        if reply is not self.reply:  # else it is told as it ends
            self.screen.line(f"interrupted after {heard_ms / 1000:.1f} s")

    def _truncated(self, event: Event) -> None:
        """What the server keeps of a cut reply is what the model will remember of it."""
        self.link.send("conversation.item.retrieve", item_id=event["item_id"])

    def _retrieved(self, event: Event) -> None:
        item = event["item"]
        reply = self._of_item.get(item["id"])
        if not reply or not item["content"]:
            return
        text = item["content"][0].get("transcript") or ""
        if text != reply.remembered:  # the server tells of its own cut, then of ours
            reply.said.text = reply.remembered = text
            self.record.write(reply.said)
            self.screen.line(f"the model remembers: {text or 'nothing'}")


def ended(reply: Reply) -> str:
    """If not by itself, how; to stand before what is told of it."""
    if reply.status == "completed":
        return ""
    if reply.status == "incomplete":
        return "cut at its longest (--max-new-tokens); "
    if reply.said.heard_ms is None:
        return "interrupted; "
    return f"interrupted after {reply.said.heard_ms / 1000:.1f} s; "
