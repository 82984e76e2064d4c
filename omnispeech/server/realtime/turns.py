"""Whose turn it is: from what the detector hears to what is committed, begun, stopped, answered."""

import asyncio

from omnispeech.engine.events import Samples
from omnispeech.errors import OmniSpeechError
from omnispeech.server.admission import Admission
from omnispeech.server.metrics import TalkFigures
from omnispeech.server.realtime.conversation import Conversation
from omnispeech.server.realtime.hearing.hearing import Hearing
from omnispeech.server.realtime.hearing.turn_detection import (
    Paused,
    Resumed,
    SpeechStarted,
    SpeechStopped,
    TurnEvent,
)
from omnispeech.server.realtime.idle_timer import IdleTimer
from omnispeech.server.realtime.items.kinds import user_sound
from omnispeech.server.realtime.protocol.ids import new_id
from omnispeech.server.realtime.protocol.refusals import ProtocolError, error_event
from omnispeech.server.realtime.replies.answers import Answers
from omnispeech.server.realtime.replies.begun_turn import BegunGuess, BegunTurn
from omnispeech.server.realtime.settings.turn_settings import ServerVAD
from omnispeech.server.realtime.transcripts import Transcripts


class Turns:
    """Of one connection."""

    def __init__(
        self,
        engine: Admission,
        conversation: Conversation,
        hearing: Hearing,
        answers: Answers,
        transcripts: Transcripts,
        figures: TalkFigures,
    ) -> None:
        self._engine = engine
        self._conversation = conversation
        self._hearing = hearing
        self._answers = answers
        self._transcripts = transcripts
        self._idle_timer = IdleTimer(self._speak_unasked)
        self._figures = figures
        self._item_id: str | None = None  # of what is being said
        self._guess: BegunGuess | None = None
        self._owed = False  # an answer, once the one under way has ended
        self.unasked = False  # the last reply: it broke a silence

    def take(self, event: TurnEvent, came_s: float) -> None:
        """came_s: when the sound arrived that made it certain, on the event loop's clock."""
        vad = self._conversation.settings.turn_detection
        if vad is None:
            return
        self._somebody_is_there()
        match event:
            case SpeechStarted():
                self._start(event, vad, came_s)
            case Paused() if vad.create_response and not self._answers.active:
                self._begin_guess(event)
            case Resumed():
                self.forget_guess()
            case SpeechStopped():
                self._stop(event, vad)

    def _start(self, event: SpeechStarted, vad: ServerVAD, came_s: float) -> None:
        self._item_id = new_id("item")
        self._conversation.tell(
            "input_audio_buffer.speech_started",
            audio_start_ms=event.start_ms,
            item_id=self._item_id,
        )
        if vad.interrupt_response and self._answers.interrupt():
            self._figures.barge_in()
            self._figures.stop_latency(asyncio.get_running_loop().time() - came_s)

    def _stop(self, event: SpeechStopped, vad: ServerVAD) -> None:
        item_id = self._item_id or new_id("item")
        self._conversation.tell(
            "input_audio_buffer.speech_stopped", audio_end_ms=event.end_ms, item_id=item_id
        )
        try:
            self.commit(self._hearing.take(event.start_ms, event.end_ms))
        except ProtocolError as exc:
            if self._answers.active or not vad.create_response:
                raise
            self.forget()
            self._answers.fail(self._conversation.settings.for_turn(), exc)
            return
        if vad.create_response:
            self.answer()

    def commit(self, samples: Samples) -> None:
        """[N] at 16 kHz: an item of the conversation. Raises ProtocolError; then it is not."""
        item = user_sound(samples, self._item_id or new_id("item"))
        self._item_id = None
        self._conversation.make_room(item)
        self._conversation.tell(
            "input_audio_buffer.committed",
            previous_item_id=self._conversation.items.last_id,
            item_id=item.id,
        )
        self._conversation.add(item)
        self._conversation.finish(item)
        if self._conversation.settings.transcription:
            self._transcripts.begin(item)

    def answer(self) -> None:
        """Begins the reply to what was said, at once or after the one that is under way."""
        if self._answers.active:
            self._owed = True
            return
        self._owed = False
        try:
            settings = self._conversation.settings.for_turn()
            self._answers.create(settings, begun=self._use_guess())
        except OmniSpeechError as exc:
            self._conversation.outbox.put(error_event(exc))

    def wait_for_speech(self, from_s: float) -> None:
        """The last reply has been heard then, on the event loop's clock."""
        vad = self._conversation.settings.turn_detection
        if vad and vad.idle_timeout_ms:
            self._idle_timer.at(from_s + vad.idle_timeout_ms / 1000)

    async def _speak_unasked(self) -> None:
        """Nobody has said anything since: the model does."""
        async with self._conversation.order:
            vad = self._conversation.settings.turn_detection
            if vad is None or self._hearing.speaking or self._answers.active:
                return
            try:
                self._time_out(vad)
            except OmniSpeechError as exc:
                self._conversation.outbox.put(error_event(exc))

    def _time_out(self, vad: ServerVAD) -> None:
        end_ms = self._hearing.clock_ms
        start_ms = max(0, end_ms - vad.prefix_padding_ms)
        self._item_id = new_id("item")
        self._conversation.tell(
            "input_audio_buffer.timeout_triggered",
            audio_start_ms=start_ms,
            audio_end_ms=end_ms,
            item_id=self._item_id,
        )
        silence = self._hearing.peek(start_ms, end_ms)
        if len(silence):  # a client may send no sound while nobody speaks
            self.commit(silence)
        self._item_id = None
        self.unasked = True
        self.answer()

    def go_on(self) -> None:
        """A reply has ended."""
        if self._owed:
            self.answer()

    def forget(self) -> None:
        """What is being said is no turn any more."""
        self._item_id = None
        self.forget_guess()

    def give_way(self) -> None:
        """The client asks for a reply by itself, which is also the one that was owed."""
        self.forget_guess()
        self._somebody_is_there()
        self._owed = False

    def _somebody_is_there(self) -> None:
        self.unasked = False
        self._idle_timer.cancel()

    def leave(self) -> None:
        self.forget()
        self._idle_timer.cancel()
        self._owed = False

    def _begin_guess(self, event: Paused) -> None:
        self.forget_guess()
        item = user_sound(self._hearing.peek(event.start_ms, event.end_ms))
        settings = self._conversation.settings.for_turn()
        try:
            request = self._answers.request(settings, also=(item,))
        except OmniSpeechError:  # told when the turn has ended
            return
        guess = self._engine.guess(request)
        self._guess = BegunGuess(guess, self._answers.begin_guess(guess, settings))

    def _use_guess(self) -> BegunTurn | None:
        begun = self._guess
        if begun is None or begun.turn.refused:
            self.forget_guess()
            return None
        self._guess = None
        begun.guess.commit()
        return begun.turn

    def forget_guess(self) -> None:
        if self._guess:
            self._guess.guess.throw_away()
            self._guess.turn.cancel()
            self._guess = None
