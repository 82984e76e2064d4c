"""The engine as the routes see it: who is let in, and how each turn ended."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Literal

from omnispeech.engine.events import Done, EngineStatus, Event, SpeechEngine, TurnRequest
from omnispeech.errors import NotReady, RequestError, Unavailable

STOPPING = "the server is stopping; try again later, or elsewhere"

# stop, length: the reply is whole, ended by the model or by a limit
Outcome = Literal["stop", "length", "cancelled", "failed", "unavailable", "refused"]


class Admission:
    """Implements SpeechEngine, for the event loop of one server.

    on_end: called once per turn when it has ended, with its Done if the reply is whole.
    """

    def __init__(
        self, engine: SpeechEngine, on_end: Callable[[Outcome, Done | None], None]
    ) -> None:
        self._engine = engine
        self._on_end = on_end
        self.stopping = False
        self.open = 0  # turns begun and not yet ended

    def stop(self) -> None:
        """No turn begins any more; those under way go on."""
        self.stopping = True

    @property
    def ready(self) -> bool:
        return self._engine.status().ready and not self.stopping

    @property
    def sample_rate_hz(self) -> int:
        return self._engine.sample_rate_hz

    def status(self) -> EngineStatus:
        return self._engine.status()

    async def answer(self, request: TurnRequest) -> AsyncGenerator[Event, None]:
        outcome: Outcome = "cancelled"
        done: Done | None = None
        self.open += 1
        try:
            if self.stopping:
                raise NotReady(STOPPING)
            async with aclosing(self._engine.answer(request)) as events:
                async for event in events:
                    if isinstance(event, Done):
                        done, outcome = event, finish(event)
                    yield event
        except Exception as exc:
            outcome = failure(exc)
            raise
        finally:
            self.open -= 1
            self._on_end(outcome, done)


def finish(done: Done) -> Outcome:
    whole = done.text_finish == done.speech_finish == "stop"
    return "stop" if whole else "length"


def failure(exc: Exception) -> Outcome:
    if isinstance(exc, Unavailable):
        return "unavailable"
    return "refused" if isinstance(exc, RequestError) else "failed"
