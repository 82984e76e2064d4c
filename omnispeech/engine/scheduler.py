"""What to compute next. Plain Python, no tensors: who waits, who joins, who goes first."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from omnispeech.engine.pace import BlockRule, LinearCost, Pace
from omnispeech.engine.playback import COMFORT_S
from omnispeech.engine.session import Session

QUIET_PREFILL = 2048  # prompt positions per step while nobody is talking: bounds the memory


@dataclass(frozen=True, slots=True)
class SoundBlock:
    """Units to decode for one reply; `final`: and everything held back with them."""

    session: Session
    units: int
    final: bool


@dataclass(frozen=True, slots=True)
class LLMTurn:
    """A row of the next LLM call: it reads a piece of its prompt, or its last token."""

    session: Session
    prompt_positions: int = 0


class Scheduler:
    """Admits replies while there is room and orders their work by deadline.

    `enter` takes memory for a reply and says whether there was enough; `leave` gives it back.
    """

    def __init__(
        self,
        *,
        max_running: int,
        prefill_tokens: int,
        enter: Callable[[Session], bool],
        leave: Callable[[Session], None],
        block_rule: BlockRule,
        decode_cost: LinearCost,
        fixed_block: int = 0,
    ) -> None:
        self.waiting: deque[Session] = deque()
        self.running: list[Session] = []
        self._max_running = max_running
        self._prefill_tokens = prefill_tokens
        self._enter = enter
        self._leave = leave
        self._block_rule = block_rule
        self._decode_cost = decode_cost
        self._fixed_block = fixed_block  # units of every block; 0: by the rule

    def insert(self, session: Session) -> None:
        self.waiting.append(session)

    @property
    def everybody(self) -> list[Session]:
        return [*self.running, *self.waiting]

    def update(self) -> None:
        """Finished and cancelled replies leave, then waiting ones join."""
        self._dismiss()
        self._admit()

    def to_hear(self, now_s: float) -> Session | None:
        """Whose sound goes through the encoder next."""
        rows = self._by_deadline(now_s)
        return next((s for s in rows if s.prefilling and not s.heard), None)

    def llm_turns(self, now_s: float) -> list[LLMTurn]:
        """The rows of the next LLM call: pieces of prompts, and rows that write."""
        prompts = self._prompt_pieces(self._by_deadline(now_s))
        return [*prompts, *map(LLMTurn, _text_rows(self._served(now_s)))]

    def speech_rows(self, now_s: float) -> list[Session]:
        """The rows of the next speech-LM call."""
        return [s for s in self._served(now_s) if s.interleaver.wants_speech]

    def block(self, now_s: float, unit_s: float) -> SoundBlock | None:
        """The most urgent block of sound that is due. unit_s: seconds one unit takes lately."""
        # a reply that only has to end gives its place to whoever waits
        rows = self._by_deadline(now_s) if self.waiting else self._served(now_s)
        blocks = (self._block(s, now_s, unit_s) for s in rows)
        return next((block for block in blocks if block), None)

    def _by_deadline(self, now_s: float) -> list[Session]:
        return sorted(
            (s for s in self.running if not s.over), key=lambda session: _deadline(session, now_s)
        )

    def _served(self, now_s: float) -> list[Session]:
        """Whoever is comfortably ahead stands back while somebody is not."""
        rows = self._by_deadline(now_s)
        return [s for s in rows if not _comfortable(s, now_s)] or rows

    def _dismiss(self) -> None:
        for session in [s for s in self.running if s.over]:
            self.running.remove(session)
            self._leave(session)
        if any(s.over for s in self.waiting):
            self.waiting = deque(s for s in self.waiting if not s.over)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_running:
            first = self.waiting[0]
            with first.own_errors():
                if not self._enter(first):
                    return  # first come, first served: a smaller one behind it must not starve it
                self.running.append(first)
            self.waiting.popleft()

    def _prompt_pieces(self, sessions: Sequence[Session]) -> list[LLMTurn]:
        """Small pieces while somebody is talking, so that no reply starves."""
        talking = any(s.interleaver.text_ids for s in sessions)
        budget = self._prefill_tokens if talking else max(self._prefill_tokens, QUIET_PREFILL)
        pieces = []
        for session in sessions:
            if budget and session.heard and session.prefilling:
                count = min(budget, session.prompt_left)
                pieces.append(LLMTurn(session, count))
                budget -= count
        return pieces

    def _block(self, session: Session, now_s: float, unit_s: float) -> SoundBlock | None:
        if session.sound_over:
            return None
        pending = len(session.pending_units)
        ended = session.interleaver.speech_finish is not None
        if self._fixed_block or session.request.seed is not None:
            most = self._fixed_block or self._block_rule.scheduled(session.blocks)
            units = most if pending >= most else 0
        else:
            pace = self._pace(session, unit_s)
            most = self._block_rule.largest(pace)
            ahead_s = session.playback.ahead_s(now_s)
            units = 0 if ended else self._block_rule.size(pending, ahead_s, pace)
        if ended and not units:
            return SoundBlock(session, min(pending, most), final=pending <= most)
        return SoundBlock(session, units, final=False) if units else None

    def _pace(self, session: Session, unit_s: float) -> Pace:
        return Pace(
            unit_s=unit_s,
            talkers=sum(not (s.over or s.sound_over) for s in self.running),
            context=session.vocoder.context,
            cost=self._decode_cost,
        )


def _deadline(session: Session, now_s: float) -> tuple[int, float]:
    """Replies not heard yet first, oldest first; then whoever's listener runs dry soonest."""
    ahead = session.playback.ahead_s(now_s)
    return (0, session.created_s) if ahead is None else (1, ahead)


def _comfortable(session: Session, now_s: float) -> bool:
    """Text that will not be spoken is waited for, however much sound there is."""
    ahead = session.playback.ahead_s(now_s)
    spoken = session.interleaver.spoken_end is None
    return spoken and ahead is not None and ahead > COMFORT_S


def _text_rows(sessions: Sequence[Session]) -> list[Session]:
    """Rows that run ahead ride along with rows the speech waits for, or fill an idle step."""
    ready = [s for s in sessions if s.interleaver.text_ids and s.interleaver.wants_text]
    if any(s.interleaver.needs_text for s in ready):
        return ready
    waiting_for_sound = any(s.playback.started_s is None for s in sessions)
    return [] if waiting_for_sound else ready
