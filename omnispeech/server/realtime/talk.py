"""One live conversation: what its client asks for, and what becomes of it."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omnispeech.config import ServerConfig, TalkConfig
from omnispeech.errors import OmniSpeechError, Unauthorized
from omnispeech.server.admission import STOPPING, Admission
from omnispeech.server.metrics import TalkEnd, TalkFigures
from omnispeech.server.realtime.commands import Commands
from omnispeech.server.realtime.conversation import Conversation
from omnispeech.server.realtime.hearing.hearing import Hearing
from omnispeech.server.realtime.items.items import Items, Limits
from omnispeech.server.realtime.outbox import Outbox
from omnispeech.server.realtime.protocol.client_events import parse
from omnispeech.server.realtime.protocol.ids import new_id
from omnispeech.server.realtime.protocol.refusals import error_event
from omnispeech.server.realtime.replies.answers import Answers
from omnispeech.server.realtime.replies.response import Response
from omnispeech.server.realtime.settings.session_settings import SessionSettings
from omnispeech.server.realtime.transcripts import Transcripts
from omnispeech.server.realtime.turns import Turns

NORMAL, POLICY, RESTART, LATER = 1000, 1008, 1012, 1013
LARGE = 500_000  # characters of an event that is read outside the event loop


@dataclass(frozen=True, slots=True)
class Close:
    """How a connection ends. reason: for the client; end: for the figures."""

    code: int
    reason: str
    end: TalkEnd


OnEnd = Callable[[Close], None]


class Talk:
    """Outlives its connections: `enter` begins and `leave` ends what belongs to one.

    on_end: called when the talk should end by itself.
    """

    def __init__(
        self, engine: Admission, config: ServerConfig, talk_config: TalkConfig, figures: TalkFigures
    ) -> None:
        self.id = new_id("sess")
        self._engine = engine
        self._config = config
        self._talk_config = talk_config
        self._figures = figures
        self._loop = asyncio.get_running_loop()
        self._ends_s = self._loop.time() + talk_config.max_talk_s
        self._expires_at = int(time.time() + talk_config.max_talk_s)
        unable = engine.status().unsupported
        settings = SessionSettings(
            may_transcribe=talk_config.transcription == "model",
            reply_tokens=talk_config.reply_tokens,
            max_text_chars=config.max_text_chars,
            unable=unable,
        )
        items = Items(Limits.of(config, talk_config, unable.get("tool_calls")))
        self._conversation = Conversation(settings, items, Outbox.closed())
        self._answers = Answers(engine, self._conversation, self._over, self._sent)
        self._hear_anew()

    async def enter(self, outbox: Outbox, on_end: OnEnd, *, resumed: bool) -> None:
        """The first event is told here."""
        self._conversation.outbox, self._on_end = outbox, on_end
        self._touch()
        refused = await self._commands.listen(self._conversation.settings)
        told = self._described() | ({"resumed": True} if resumed else {})
        self._conversation.tell("session.created", session=told)
        self._commands.tell_errors(refused)

    async def leave(self, *, lost: bool) -> None:
        """The connection ends; lost: what it was being told ends where it was lost."""
        self._turns.leave()
        await self._transcripts.leave()
        await self._answers.abandon_all(unsent=lost)
        self._hear_anew()

    def _hear_anew(self) -> None:
        """Nothing that was being said matters any more."""
        conversation, speculate_ms = self._conversation, self._talk_config.speculate_ms
        hearing = Hearing(conversation.settings, self._config.max_audio_s, speculate_ms)
        self._transcripts = Transcripts(self._engine, conversation)
        self._turns = Turns(
            self._engine, conversation, hearing, self._answers, self._transcripts, self._figures
        )
        self._hearing = hearing
        self._commands = Commands(
            conversation,
            hearing,
            self._turns,
            self._answers,
            self._config.max_audio_s,
            describe=self._described,
            touch=self._touch,
        )

    async def take(self, text: str) -> None:
        """One event of the client. Nothing it says ends the talk."""
        event_id: str | None = None
        try:
            read = asyncio.to_thread(parse, text) if len(text) > LARGE else None
            event = await read if read else parse(text)
            event_id = event.event_id
            async with self._conversation.order:
                await self._commands.obey(event)
        except OmniSpeechError as exc:
            self._conversation.outbox.put(error_event(exc, event_id))

    def due(self) -> tuple[float, Close]:
        """When this talk has to end if nothing more happens, and how."""
        idle_s = self._talk_config.talk_idle_s
        silent = Close(NORMAL, f"nobody has spoken for {idle_s:g} s (talk_idle_s)", "idle")
        longest = self._talk_config.max_talk_s
        old = Close(NORMAL, f"the talk has lasted {longest:g} s (max_talk_s)", "duration")
        if self._ends_s <= self._silent_from_s() + idle_s:
            return self._ends_s, old
        return self._silent_from_s() + idle_s, silent

    def stop_soon(self) -> None:
        """The server stops: the replies under way are the last."""
        if not self._answers.busy:
            self._on_end(Close(RESTART, STOPPING, "stopping"))

    def _silent_from_s(self) -> float:
        replying = self._answers.busy and not self._turns.unasked
        busy = replying or self._hearing.speaking
        return self._loop.time() if busy else self._last_active_s

    def _touch(self) -> None:
        self._last_active_s = self._loop.time()

    def _described(self) -> dict[str, Any]:
        model = self._config.model_name
        return self._conversation.settings.described(self.id, model, self._expires_at)

    def _over(self, response: Response, failure: OmniSpeechError | None) -> None:
        """A reply has ended."""
        if isinstance(failure, Unauthorized):
            self._on_end(Close(POLICY, str(failure), "policy"))
        elif self._engine.stopping:
            self.stop_soon()
        elif not response.out_of_band:
            self._turns.go_on()

    def _sent(self, response: Response) -> None:
        """The client has been sent all of a reply."""
        if not self._turns.unasked:  # or a model that breaks every silence would never be alone
            self._last_active_s = max(self._loop.time(), response.played_s)
        if response.status in ("completed", "incomplete"):
            self._turns.wait_for_speech(response.played_s)
