"""The sound a client sends in the course of one conversation, and its clock."""

from collections import deque
from copy import copy

import numpy as np

from omnispeech.audio.formats import AudioFormat
from omnispeech.audio.polyphase import LiveResampler
from omnispeech.engine.events import INPUT_RATE_HZ, Samples
from omnispeech.errors import AudioError

PER_MS = INPUT_RATE_HZ // 1000
NOTHING = np.zeros(0, np.float32)


class InputAudio:
    """The input audio buffer: 16 kHz samples since the last commit, at most `max_s` of them.

    All times are milliseconds of sound since the conversation began. A sample keeps its place on
    that clock whatever is committed, cleared, forgotten or sent in another format.

    A stream may be cut anywhere: half a sample (an odd byte of PCM) waits for the next append. It
    is dropped where the stream ends (commit, clear, another format): its other half will not come,
    and what is sent next would be noise with it.
    """

    def __init__(self, format: AudioFormat, max_s: float) -> None:
        self.max_s = max_s
        self._pieces: deque[Samples] = deque()
        self._begin = 0  # the place of the first sample held
        self._end = 0  # the place after the last
        self._flushed = NOTHING  # of a format before: its last samples, not yet given out
        self._open(format)

    def _open(self, format: AudioFormat) -> None:
        self._format = format
        self._resampler = LiveResampler(format.rate, INPUT_RATE_HZ)
        self._half = b""

    @property
    def clock_ms(self) -> int:
        """How much has come since the conversation began, but for what the resampler holds."""
        return self._end // PER_MS

    @property
    def held_ms(self) -> float:
        """Of `held`, but for what the resampler holds."""
        return (self._end - self._begin) / PER_MS

    def append(self, data: bytes) -> Samples:
        """The next sound -> [N], what is new at 16 kHz (the resampler holds a few ms back).

        Raises AudioError, and keeps nothing of it, if the buffer would hold more than `max_s`.
        """
        sound = self._half + data
        whole = len(sound) - len(sound) % self._format.bytes_per_sample
        seconds = (self.held_ms + self._format.milliseconds(whole)) / 1000
        if seconds > self.max_s:
            raise AudioError(
                f"the input audio buffer would hold {seconds:.1f} s; at most {self.max_s:g} s "
                "may wait: commit or clear it first"
            )
        self._half = sound[whole:]
        return self._keep(self._resampler.push(self._format.decode(sound[:whole])))

    def change_format(self, format: AudioFormat) -> None:
        """Of what comes from now on; the last samples of the old one come with the next append."""
        if format != self._format:
            self._flushed = np.concatenate([self._flushed, self._resampler.finish()])
            self._open(format)

    def held(self) -> Samples:
        """[N]: all of it, to the last sample; the buffer stays as it is."""
        rest = copy(self._resampler).finish()
        return np.concatenate([*self._pieces, _clipped(self._flushed, rest)])

    def clear(self) -> None:
        """The stream ends here, whether what is held was committed or not."""
        self._keep(self._resampler.finish())
        self._open(self._format)
        self._drop_before(self._end)

    def peek(self, from_ms: int, to_ms: int) -> Samples:
        """[N] of [from_ms, to_ms), as far as it is held."""
        start = max(0, from_ms * PER_MS - self._begin)
        return self._joined()[start : max(0, to_ms * PER_MS - self._begin)]

    def take(self, from_ms: int, to_ms: int) -> Samples:
        """As `peek`; all that came before `to_ms` is forgotten."""
        sound = self.peek(from_ms, to_ms)
        self.forget(to_ms)
        return sound

    def forget(self, before_ms: int) -> None:
        self._drop_before(min(before_ms * PER_MS, self._end))

    def _keep(self, samples: Samples) -> Samples:
        new = _clipped(self._flushed, samples)
        self._flushed = NOTHING
        if len(new):
            self._pieces.append(new)
            self._end += len(new)
        return new

    def _joined(self) -> Samples:
        return np.concatenate(self._pieces) if self._pieces else NOTHING

    def _drop_before(self, place: int) -> None:
        while self._pieces and self._begin + len(self._pieces[0]) <= place:
            self._begin += len(self._pieces.popleft())
        if self._begin < place:
            # a copy: a view would keep the memory of the whole piece
            self._pieces[0] = self._pieces[0][place - self._begin :].copy()
            self._begin = place


def _clipped(*pieces: Samples) -> Samples:
    """In one; the filter swings over full scale beside a loud edge."""
    return np.clip(np.concatenate(pieces), -1.0, 1.0)
