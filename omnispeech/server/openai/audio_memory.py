"""What was said in spoken replies, so that a history can name them by their audio id."""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from omnispeech.server.openai.refusals import Refused
from omnispeech.server.reply import Reply

KEPT_S = 3600


@dataclass(frozen=True, slots=True)
class Said:
    """reply: what is known of it grows while it is being told."""

    reply: Reply
    expires_at: int  # seconds since 1970


class AudioMemory:
    """The last `keep` replies used, each for an hour. The model remembers words: sound is not kept.

    May be called from any thread.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._said: OrderedDict[str, Said] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def add(self, audio_id: str, said: Said) -> None:
        with self._lock:
            self._said[audio_id] = said
            while len(self._said) > self._keep:
                self._said.popitem(last=False)

    def text_of(self, audio_id: str, param: str) -> str:
        """param: the field that names it, for the refusal."""
        with self._lock:
            said = self._said.get(audio_id)
            if said is None:
                raise Refused(
                    f"{param}={audio_id[:60]!r} is not known here; the server keeps the last "
                    f"{self._keep} spoken replies until it ends: send the text as content instead",
                    param=param,
                    code="audio_not_found",
                )
            if said.expires_at <= time.time():
                del self._said[audio_id]
                raise Refused(
                    f"{param}={audio_id!r} has expired; a spoken reply is kept for {KEPT_S} s: "
                    "send its text as content instead",
                    param=param,
                    code="audio_expired",
                )
            self._said.move_to_end(audio_id)
            return said.reply.text


def expiry() -> int:
    return int(time.time()) + KEPT_S
