"""One conversation: what the server tells, and what the person does."""

import asyncio
import re
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from omnispeech.audio.io import SAMPLE_RATE_HZ
from omnispeech.client import ServerError, complain
from omnispeech.terminal.link import LOST, Event, Link
from omnispeech.terminal.player import Player
from omnispeech.terminal.questions import YOU, Questions
from omnispeech.terminal.record import Record, Said
from omnispeech.terminal.replies import Replies, Reply
from omnispeech.terminal.screen import Screen
from omnispeech.terminal.timing import Timing

# what was meant has happened already
HARMLESS = (
    "response_cancel_not_active",
    "input_audio_buffer_commit_empty",
    "item_delete_invalid_item_id",
)
TAKEN = "item_create_duplicate_item_id"  # it arrived before the connection was lost
SETTING = re.compile(r"session\b")
MARK = "mark"
QUIET_S = 0.02  # between looks at whether all is quiet
NO_TRANSCRIPTS = "audio.input.transcription"


@dataclass(slots=True)
class Question:
    """A whole recording, asked until it is answered, over lost connections too."""

    pcm: bytes
    name: str
    answered: "asyncio.Future[Reply]"
    id: str = field(default_factory=lambda: f"file_{uuid4().hex[:20]}")


class Talk:
    def __init__(
        self,
        link: Link,
        player: Player,
        screen: Screen,
        record: Record,
        session: dict[str, Any],
        *,
        to_files: bool = False,
    ) -> None:
        self.screen = screen
        self.ready = asyncio.Event()  # the server has the settings
        self.status = 0  # of the command: 1 after an error
        self.lost = False
        self.prompting = False  # the person types: nothing is drawn
        self.replies = Replies(link, player, screen, record, to_files, self._answered)
        self.questions = Questions(link, screen, record, self.replies.silence, self._await_reply)
        self._link = link
        self._player = player
        self._record = record
        self._session = session
        self._question: Question | None = None
        self._cut_off: Reply | None = None  # by the lost connection
        self._marks: dict[str, asyncio.Event] = {}
        self._handlers: dict[str, Callable[[Event], None]] = {
            **self.replies.handlers(),
            **self.questions.handlers(),
            "session.created": self._begin,
            "session.updated": self._agreed,
            "conversation.item.done": self._taken,
            "error": self._troubled,
            LOST: self._lose,
        }

    @property
    def phase(self) -> str:
        if self.lost or not self.ready.is_set():
            return "connecting" if not self.lost else "connection lost"
        if self.questions.open:
            return "hearing you"
        if self.replies.thinking:
            return "thinking"
        return "speaking" if self.replies.speaking else "listening"

    @property
    def level(self) -> float:
        return self._player.level if self.phase == "speaking" else self.questions.level

    async def run(self) -> None:
        """Takes what the server tells. Raises ServerError when it is over."""
        async for event in self._link.events():
            if handler := self._handlers.get(event["type"]):
                handler(event)

    async def ask(self, pcm: bytes, name: str) -> bool:
        """A whole recording, 16-bit mono at 16 kHz. False if it failed: then it is forgotten."""
        question = Question(pcm, name, asyncio.get_running_loop().create_future())
        self._question = question
        said = self._record.add(Said(YOU, SAMPLE_RATE_HZ, pcm=bytearray(pcm)))
        self._record.write(said)
        self.screen.line(f"{YOU}: {name} [{said.seconds:.1f} s of sound]", YOU)
        self._put(question)
        reply = await question.answered
        self._question = None
        if reply.message:
            self._forget(question, reply)
        return not reply.message

    async def quiet(self) -> None:
        """Until the server has taken all that was sent, answered it, and it was heard."""
        name = f"{MARK}_{len(self._marks)}"
        self._marks[name] = asyncio.Event()
        self._link.send("conversation.item.retrieve", item_id=name, event_id=name)
        await self._marks[name].wait()
        while self._busy:
            await asyncio.sleep(QUIET_S)

    @property
    def _busy(self) -> bool:
        replies = self.replies
        return replies.thinking or replies.speaking or self.lost or bool(self.questions.unwritten)

    def _put(self, question: Question) -> None:
        content = [{"type": "input_audio", "audio": b64encode(question.pcm).decode()}]
        item = {"id": question.id, "type": "message", "role": "user", "content": content}
        self._link.send("conversation.item.create", item=item, event_id=question.id)
        self._await_reply(Timing(time.monotonic()))

    def _taken(self, event: Event) -> None:
        """Only a question that was taken is answered: else the one before it would be."""
        if self._question and event["item"]["id"] == self._question.id:
            self._want_reply(self._question)

    def _want_reply(self, question: Question) -> None:
        self._link.send("response.create", event_id=question.id)

    def _forget(self, question: Question, reply: Reply) -> None:
        for item in filter(None, (question.id, reply.item)):
            self._link.send("conversation.item.delete", item_id=item)

    def _await_reply(self, timing: Timing) -> None:
        self.replies.awaited = timing

    def _answered(self, reply: Reply) -> None:
        if reply.message:
            self.fail(reply.message)
        if self._question and not self._question.answered.done():
            self._question.answered.set_result(reply)

    def fail(self, message: str) -> None:
        """One line; the conversation goes on, its status is 1."""
        self.screen.leave()
        self.status = complain(ServerError(message))

    def _begin(self, event: Event) -> None:
        session = event["session"]
        self.questions.transcribed = NO_TRANSCRIPTS not in session.get("unsupported", {})
        self.questions.begin(session.get("input_audio_ms", 0))
        if self.ready.is_set():
            self._resume()
            return
        self.lost = False
        wanted = self._session
        if self.questions.transcribed:
            heard = wanted["audio"]["input"] | {"transcription": {"model": "omnispeech"}}
            wanted = wanted | {"audio": wanted["audio"] | {"input": heard}}
        self._link.send("session.update", session=wanted)

    def _agreed(self, _: Event) -> None:
        self.ready.set()

    def _lose(self, _: Event) -> None:
        if self.lost:
            return
        self.lost = True
        self._cut_off = self.replies.forget()
        self.questions.forget()
        self.screen.line("the connection is lost; trying to come back")

    def _resume(self) -> None:
        self.lost = False
        reply, self._cut_off = self._cut_off, None
        self.screen.line("connected again")
        for mark in self._marks.values():
            mark.set()
        if self._question and not self._question.answered.done():
            self._ask_again(self._question, reply)
        elif reply:
            self.replies.settle(reply)

    def _ask_again(self, question: Question, reply: Reply | None) -> None:
        """What came of the reply is neither kept nor remembered."""
        self._player.stop()
        if reply and reply.item:
            self._link.send("conversation.item.delete", item_id=reply.item)
        self._put(question)

    def _troubled(self, event: Event) -> None:
        """Raises ServerError if the conversation cannot be as it was asked for."""
        error = event["error"]
        if mark := self._marks.get(error.get("event_id") or ""):
            mark.set()
        elif SETTING.match(error.get("param") or ""):
            raise ServerError(error["message"])
        elif error["code"] == TAKEN and self._question:
            self._want_reply(self._question)
        elif error["code"] not in HARMLESS:
            self.replies.awaited = None  # there will be none
            self._refuse(error)

    def _refuse(self, error: Event) -> None:
        question = self._question
        self.fail(error["message"])
        if question and error.get("event_id") == question.id and not question.answered.done():
            nothing = Said(YOU, SAMPLE_RATE_HZ)
            question.answered.set_result(Reply(Timing(0.0), nothing, message=error["message"]))
