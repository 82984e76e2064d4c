"""The replies of one conversation: one at a time, and a few beside it that leave no trace."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, nullcontext

from omnispeech.engine.events import Event, TurnRequest
from omnispeech.errors import GenerationError, OmniSpeechError, PromptTooLong
from omnispeech.server.admission import Admission, Guess
from omnispeech.server.realtime.conversation import Conversation
from omnispeech.server.realtime.items.kinds import Item
from omnispeech.server.realtime.outbox import REPLY_ROOM
from omnispeech.server.realtime.protocol.refusals import (
    ProtocolError,
    cancel_not_active,
    nothing_in_input,
    nothing_to_answer,
    response_active,
    response_not_found,
)
from omnispeech.server.realtime.replies.begun_turn import BegunTurn
from omnispeech.server.realtime.replies.response import Reason, Response
from omnispeech.server.realtime.settings.session_settings import ResponseSettings

logger = logging.getLogger(__name__)

MAX_BESIDE = 4  # replies out of band at a time

OnOver = Callable[[Response, OmniSpeechError | None], None]


class Answers:
    """on_over: called when a reply has ended and the engine has let go, with what went wrong.
    on_sent: called when the client has got all of a reply of the conversation."""

    def __init__(
        self,
        engine: Admission,
        conversation: Conversation,
        on_over: OnOver,
        on_sent: Callable[[Response], None],
    ) -> None:
        self._engine = engine
        self._conversation = conversation
        self._on_over = on_over
        self._on_sent = on_sent
        self._place = asyncio.Lock()  # of the conversation in the engine
        self._last: Response | None = None  # of the conversation
        self._turns: dict[Response, BegunTurn] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def active(self) -> Response | None:
        """Of the conversation."""
        last = self._last
        return last if last and last.status == "in_progress" else None

    @property
    def busy(self) -> bool:
        return bool(self._turns)

    def check_free(self, settings: ResponseSettings) -> None:
        """Raises ProtocolError if no such reply can begin now."""
        if not settings.out_of_band and self.active:
            raise response_active(self.active.id)
        beside = sum(response.out_of_band for response in self._turns)
        if settings.out_of_band and beside >= MAX_BESIDE:
            raise ProtocolError(
                f"{beside} responses out of band are active; wait for one to end",
                code="too_many_responses",
            )

    def create(
        self,
        settings: ResponseSettings,
        chosen: tuple[Item, ...] | None = None,
        begun: BegunTurn | None = None,
    ) -> None:
        """chosen: what is answered; None: the conversation. begun: the turn of this very reply.

        Raises ProtocolError; then nothing was begun.
        """
        self.check_free(settings)
        if begun is None:
            events = self._engine.answer(self.request(settings, chosen))
            place = nullcontext() if settings.out_of_band else self._place
            begun = BegunTurn(self._fitting(events, settings, lambda: chosen is None), place)
        response = self._begin(settings)
        self._turns[response] = begun
        if not settings.out_of_band:
            self._last = response
        task = asyncio.create_task(self._tell(response, begun))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def fail(self, settings: ResponseSettings, exc: OmniSpeechError) -> None:
        """A reply that ends as it begins. Raises ProtocolError; then nothing was told."""
        self.check_free(settings)
        self._begin(settings).fail(exc)

    def _begin(self, settings: ResponseSettings) -> Response:
        response = Response(self._conversation, settings, self._engine.sample_rate_hz, self._sent)
        response.begin()
        return response

    def request(
        self,
        settings: ResponseSettings,
        chosen: tuple[Item, ...] | None = None,
        also: tuple[Item, ...] = (),
        *,
        can_shorten: bool = True,
    ) -> TurnRequest:
        """also: what comes after the conversation. can_shorten: if the settings allow it.

        Raises ProtocolError if there is nothing.
        """
        messages = self._conversation.items.messages(settings.instructions, chosen, also)
        if not messages:
            raise nothing_to_answer() if chosen is None else nothing_in_input()
        return TurnRequest(
            messages=messages,
            speech=settings.speech,
            tools=settings.tools,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            can_shorten=can_shorten and chosen is None and settings.truncation.allowed,
        )

    def begin_guess(self, guess: Guess, settings: ResponseSettings) -> BegunTurn:
        """One that is refused for its length shortens nothing before it is known to be right."""
        return BegunTurn(self._fitting(guess.events, settings, lambda: guess.used), self._place)

    def cancel(self, response_id: str | None) -> None:
        """Raises ProtocolError if it is not active."""
        if response_id is None:
            wanted = self.active
        else:
            wanted = next((r for r in self._turns if r.id == response_id), None)
        if wanted is None or not self._stop(wanted, "client_cancelled"):
            raise cancel_not_active() if response_id is None else response_not_found(response_id)

    def interrupt(self) -> bool:
        """Somebody speaks: True if a reply was stopped by it."""
        return self._last is not None and self._stop(self._last, "turn_detected")

    def _stop(self, response: Response, reason: Reason) -> bool:
        stopped = response.stop(reason)
        if stopped and response in self._turns:
            self._turns[response].cancel()
        return stopped

    async def abandon_all(self, *, unsent: bool) -> None:
        """The connection ends, with the replies under way; unsent: also with what was made and
        not sent. Returns when the engine has let go of everything."""
        for response, turn in self._turns.items():
            response.abandon()
            turn.cancel()
        if self._last and unsent:
            self._last.abandon()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _sent(self, response: Response) -> None:
        if not response.out_of_band:
            self._on_sent(response)

    async def _fitting(
        self,
        events: AsyncGenerator[Event, None],
        settings: ResponseSettings,
        answers_conversation: Callable[[], bool],
    ) -> AsyncGenerator[Event, None]:
        """The conversation is shortened until it fits and leaves room for the reply, if the
        settings allow it; at last the reply has the room there is."""
        can_shorten = settings.truncation.allowed
        while True:
            try:
                async with aclosing(events):
                    async for event in events:
                        yield event
                return
            except PromptTooLong as exc:
                if not can_shorten or not answers_conversation():
                    raise
                can_shorten = self._shorten(exc, settings)
                events = self._engine.answer(self.request(settings, can_shorten=can_shorten))

    def _shorten(self, exc: PromptTooLong, settings: ResponseSettings) -> bool:
        """False: nothing may be left out."""
        items = self._conversation.items
        return items.shorten(exc, settings.truncation, settings.instructions)

    async def _tell(self, response: Response, turn: BegunTurn) -> None:
        failure: OmniSpeechError | None = None
        try:
            async for event in turn:
                response.take(event)
                await self._conversation.outbox.room(REPLY_ROOM)
        except OmniSpeechError as exc:
            failure = exc
        except Exception:
            logger.exception("a reply of /v1/realtime failed")
            failure = GenerationError("the server failed; its log has the reason")
        finally:
            await turn.aclose()
            del self._turns[response]
        response.fail(failure or GenerationError("the reply ended before it was whole"))
        self._on_over(response, failure)
