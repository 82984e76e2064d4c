"""What one API key has left: requests and sound by the minute, conversations at once."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from omnispeech.errors import TooManyRequests, Unauthorized

Clock = Callable[[], float]

A_PLACE_S = 1  # nobody knows when a conversation ends: ask again after this


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """None: no limit."""

    conversations: int | None = None  # at once: live ones, and replies under way
    requests_per_minute: int | None = None
    audio_seconds_per_minute: float | None = None  # sent and received together


NO_LIMITS = Limits()


class Bucket:
    """Holds a minute's worth at most, and fills again at that pace."""

    def __init__(self, per_minute: float, clock: Clock = time.monotonic) -> None:
        self._most = self._level = per_minute
        self._clock = clock
        self._seen_s = clock()

    def wait_s(self) -> float:
        """Seconds until there is 1 in it; 0: there is."""
        self._fill()
        return max(0.0, (1 - self._level) * 60 / self._most)

    def take(self, amount: float) -> None:
        """More than there is may be taken: how long a sound becomes is known when it has been."""
        self._fill()
        self._level -= amount

    def _fill(self) -> None:
        now_s = self._clock()
        self._level = min(self._most, self._level + (now_s - self._seen_s) * self._most / 60)
        self._seen_s = now_s


class Account:
    """Of one key, as long as the key is known; a lock makes it good for any thread.

    look: called before each request; may revoke the account or change its limits.
    """

    def __init__(
        self,
        name: str,
        limits: Limits = NO_LIMITS,
        clock: Clock = time.monotonic,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.revoked = False
        self.conversations = 0
        self._clock, self._look = clock, look
        self._lock = threading.Lock()
        self._set(limits)

    def set_limits(self, limits: Limits) -> None:
        """Those that stay as they are keep what was used of them."""
        with self._lock:
            if limits != self._limits:
                self._set(limits)

    def _set(self, limits: Limits) -> None:
        self._limits = limits
        self._requests = self._bucket(limits.requests_per_minute)
        self._audio = self._bucket(limits.audio_seconds_per_minute)

    def _bucket(self, per_minute: float | None) -> Bucket | None:
        return None if per_minute is None else Bucket(per_minute, self._clock)

    def take_request(self) -> None:
        """Raises TooManyRequests, or Unauthorized once the key was taken away."""
        self._look()
        if self.revoked:
            raise Unauthorized(f"the API key {self.name!r} was taken away; use another")
        with self._lock:
            self._check_minute()
            if self._requests:
                self._requests.take(1)

    def peek(self) -> None:
        """Raises TooManyRequests if a reply asked for now would be refused; counts nothing."""
        with self._lock:
            self._check_places()
            self._check_minute()

    def _check_minute(self) -> None:
        self._refuse(self._requests, f"{self._limits.requests_per_minute} requests")
        seconds = f"{self._limits.audio_seconds_per_minute or 0:g} seconds of sound"
        self._refuse(self._audio, seconds)

    def _refuse(self, bucket: Bucket | None, limit: str) -> None:
        if bucket and (wait_s := bucket.wait_s()):
            after_s = math.ceil(wait_s)
            raise TooManyRequests(
                f"the API key {self.name!r} has used up its {limit} per minute; "
                f"ask again in {after_s} s",
                after_s,
            )

    def take_audio(self, seconds: float) -> None:
        with self._lock:
            if self._audio:
                self._audio.take(seconds)

    def take_conversation(self) -> None:
        """Raises TooManyRequests; `end_conversation` gives the place back."""
        with self._lock:
            self._check_places()
            self.conversations += 1

    def _check_places(self) -> None:
        most = self._limits.conversations
        if most is not None and self.conversations >= most:
            raise TooManyRequests(
                f"the API key {self.name!r} has {most} of its {most} conversations at once; "
                "end one first",
                A_PLACE_S,
            )

    def end_conversation(self) -> None:
        with self._lock:
            self.conversations -= 1
