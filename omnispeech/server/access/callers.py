"""Who is asking, as whoever serves the request sees it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from omnispeech.engine.events import INPUT_RATE_HZ, Audio, Message
from omnispeech.server.access.quotas import Account


@dataclass(frozen=True, slots=True)
class Caller:
    """One request or connection. live: a WebSocket, whose replies belong to its talk."""

    account: Account
    live: bool = False

    @property
    def name(self) -> str:
        """Of the key, never the key itself."""
        return self.account.name

    def check(self) -> None:
        """Counts one request; raises TooManyRequests or Unauthorized."""
        self.account.take_request()

    def charge(self, messages: Sequence[Message], reply_s: float) -> None:
        """The sound of a reply, and that of its question: all that was sent with a request, or
        what a talk has heard since the last answer."""
        self.account.take_audio(
            reply_s + seconds_of(since_answer(messages) if self.live else messages)
        )

    @contextmanager
    def talk(self) -> Iterator[None]:
        """A place among the conversations of the key; raises TooManyRequests."""
        self.account.take_conversation()
        try:
            yield
        finally:
            self.account.end_conversation()

    @contextmanager
    def reply(self) -> Iterator[None]:
        """A place for one reply, unless it belongs to a talk, which has its own."""
        if self.live:
            yield
            return
        with self.talk():
            yield


def seconds_of(messages: Sequence[Message]) -> float:
    parts = (part for message in messages for part in message.content)
    samples = sum(len(part.samples) for part in parts if isinstance(part, Audio))
    return samples / INPUT_RATE_HZ


def since_answer(messages: Sequence[Message]) -> Sequence[Message]:
    answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
    return messages[answers[-1] + 1 :] if answers else messages


# without keys everybody is the same, and has no limits
ANYBODY = Account("anybody")
CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller(ANYBODY))  # noqa: B039
