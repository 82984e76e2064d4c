"""Who may move next in one reply, and when it is over (spec: opens2s 11; defects B5, B7).

Plain Python: the runner asks what to compute and tells which ids were chosen. The LLM writes text
tokens, each with a state; the speech LM reads the next R states and writes W units, reads the
next R, and so on. After the last state it writes units until its end id or its limit.

A reply in text alone and one that goes over to calling functions are one rule: the state from which
on nothing is spoken (`spoken_end`).
"""

from dataclasses import dataclass
from typing import Literal

from omnispeech.engine.events import Finish

Choice = Literal["vocabulary", "units", "units_or_end"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Limits and end ids of one reply.

    compatible=False mends the original: units only until the text has ended, and the unit limit
    counts from there, so that it can never cut the text.
    """

    read: int  # R: states per span
    write: int  # W: units per span
    text_limit: int
    unit_limit: int
    text_end: frozenset[int]
    speech_end: frozenset[int]
    run_ahead: int = 0  # states the LLM may be ahead of the speech LM
    speech: bool = True  # False: text alone
    compatible: bool = False

    @property
    def most_units(self) -> int:
        """No reply can be longer."""
        if self.compatible:
            return self.unit_limit
        return -(-self.text_limit // self.read) * self.write + self.unit_limit

    @property
    def speech_positions(self) -> int:
        """What the speech LM may have to read: the speaker, states, units."""
        return 1 + self.text_limit + self.most_units if self.speech else 0


@dataclass(frozen=True, slots=True)
class SpeechInput:
    """What the speech LM reads next: its last unit (None: the speaker vector, at the very start,
    or nothing to lead), then states of the LLM."""

    lead: int | None
    states: range


class Interleaver:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.text_ids: list[int] = []
        self.unit_ids: list[int] = []  # ids of the speech vocabulary, end ids included
        self.text_finish: Finish | None = None
        self.speech_finish: Finish | None = None
        self.spoken_end: int | None = None  # states that are spoken; None: all
        self._settled = 0  # states of which it is known that they are spoken
        self._states_read = 0
        self._span_left = 0  # units still to be written before more states are read
        self._last_span = False  # the one that goes on until the end
        if not rules.speech:
            self.cut()

    @property
    def done(self) -> bool:
        return self.text_finish is not None and self.speech_finish is not None

    @property
    def silent(self) -> bool:
        """Not a word of it is spoken."""
        return self.spoken_end == 0

    @property
    def ahead(self) -> int:
        """States that the speech LM may read and has not read yet."""
        return self._settled - self._states_read

    @property
    def needs_text(self) -> bool:
        """The speech waits for the LLM, or the caller does, where nothing is spoken any more."""
        if self.text_finish is not None:
            return False
        return self.spoken_end is not None or (not self._span_left and self.ahead < self.rules.read)

    @property
    def wants_text(self) -> bool:
        if self.text_finish is not None:
            return False
        return self.needs_text or self.ahead < self.rules.run_ahead

    @property
    def wants_speech(self) -> bool:
        if self.speech_finish is not None:
            return False
        if self._span_left or self.text_finish is not None or self.spoken_end is not None:
            return True
        return self.ahead >= self.rules.read

    @property
    def choice(self) -> Choice:
        """Which ids the speech LM may choose next."""
        if self.rules.compatible:
            return "vocabulary"
        return "units_or_end" if self._last_span else "units"

    def add_text(self, token: int, *, held: bool = False) -> None:
        """The LLM chose `token`; the state it was chosen from joins the queue.

        held: the queue waits until it is known whether this is spoken, at the latest until the
        text ends.
        """
        self.text_ids.append(token)
        if token in self.rules.text_end:
            self.text_finish = "stop"
        elif len(self.text_ids) >= self.rules.text_limit:
            self.text_finish = "length"
        if self.spoken_end is None and (not held or self.text_finish is not None):
            self._settled = len(self.text_ids)

    def cut(self) -> None:
        """What was held is not spoken, nor is all that follows."""
        if self.spoken_end is None:
            self.spoken_end = self._settled
            if self.silent:
                self.speech_finish = "stop"

    def next_input(self) -> SpeechInput | None:
        """What to feed; None if the reply ends here because no unit may be written any more."""
        lead = self.unit_ids[-1] if self.unit_ids else None
        if self._span_left:
            return SpeechInput(lead, range(0))
        start = self._states_read
        self._states_read += min(self.rules.read, self.ahead)
        self._last_span = self._nothing_follows(start)
        self._span_left = self._quota()
        if self._span_left < 1:
            self._stop()
            return None
        return SpeechInput(lead, range(start, self._states_read))

    def _nothing_follows(self, start: int) -> bool:
        """After a cut the last span is one that reads no state: when the LLM wrote what is not
        spoken, soon or late, then changes no unit."""
        if self.spoken_end is not None:
            return start == self._states_read
        return self.text_finish is not None and self.ahead == 0

    def _quota(self) -> int:
        if not self.rules.compatible:
            return self.rules.unit_limit if self._last_span else self.rules.write
        left = self.rules.unit_limit - len(self.unit_ids)
        return left if self._last_span else min(self.rules.write, left)

    def _stop(self) -> None:
        """The unit limit is used up before the text has ended: only compatible rules get here."""
        self.speech_finish = "length"
        self.text_finish = self.text_finish or "length"

    def add_unit(self, chosen: int) -> None:
        self.unit_ids.append(chosen)
        self._span_left -= 1
        if chosen in self.rules.speech_end:
            self._span_left = 0
            if self._last_span:
                self.speech_finish = "stop"
        elif not self._span_left and self._last_span:
            self.speech_finish = "length"
