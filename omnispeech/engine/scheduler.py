"""What to compute next. Plain Python, no tensors: who waits, who joins, who goes first."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from omnispeech.engine.playback import COMFORT_S, BlockRule, DecodeTime
from omnispeech.engine.session import Session


@dataclass(frozen=True, slots=True)
class Block:
    """Units to decode for one reply; `final`: and everything held back with them."""

    session: Session
    units: int
    final: bool


@dataclass(frozen=True, slots=True)
class LLMTurn:
    """A row of the next LLM call: it reads a piece of its prompt, or its last token."""

    session: Session
    prompt_positions: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    listen: Session | None  # its sound goes through the encoder
    llm: list[LLMTurn]
    speech: list[Session]  # one unit each
    block: Block | None

    @property
    def idle(self) -> bool:
        return not (self.listen or self.llm or self.speech or self.block)


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
        decode_time: DecodeTime,
    ) -> None:
        self.waiting: deque[Session] = deque()
        self.running: list[Session] = []
        self._max_running = max_running
        self._prefill_tokens = prefill_tokens
        self._enter = enter
        self._leave = leave
        self._block_rule = block_rule
        self._decode_time = decode_time

    def insert(self, session: Session) -> None:
        self.waiting.append(session)

    def plan(self, now_s: float, unit_s: float) -> Plan:
        """Finished and cancelled replies leave first, then waiting ones join, then work is chosen.

        now_s: the clock; unit_s: seconds one unit takes lately.
        """
        self._dismiss()
        self._admit()
        by_deadline = sorted(self.running, key=lambda s: _deadline(s, now_s))
        hurried = [s for s in by_deadline if not _comfortable(s, now_s)]
        # whoever is comfortably ahead stands back while somebody is not
        served = hurried or by_deadline
        return Plan(
            listen=next((s for s in by_deadline if s.prefilling and not s.heard), None),
            llm=[*self._prefill(by_deadline), *map(LLMTurn, _text_rows(served))],
            speech=[s for s in served if s.interleaver.wants_speech],
            block=self._block(by_deadline, now_s, unit_s),
        )

    def _dismiss(self) -> None:
        for session in [s for s in self.running if s.over]:
            self.running.remove(session)
            self._leave(session)
        if any(s.over for s in self.waiting):
            self.waiting = deque(s for s in self.waiting if not s.over)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_running:
            if not self._enter(self.waiting[0]):
                return  # first come, first served: a smaller one behind it must not starve it
            self.running.append(self.waiting.popleft())

    def _prefill(self, sessions: Sequence[Session]) -> list[LLMTurn]:
        """All of a prompt when nobody is talking, else a piece, so that no reply starves."""
        talking = any(s.interleaver.text_ids for s in sessions)
        budget = self._prefill_tokens if talking else sum(s.prompt_left for s in sessions)
        pieces = []
        for session in sessions:
            if budget and session.heard and session.prefilling:
                count = min(budget, session.prompt_left)
                pieces.append(LLMTurn(session, count))
                budget -= count
        return pieces

    def _block(self, sessions: Sequence[Session], now_s: float, unit_s: float) -> Block | None:
        for session in sessions:
            pending = len(session.pending_units)
            if session.interleaver.speech_finish is not None and not session.flushed:
                most = self._block_rule.fixed or self._block_rule.most
                final = pending <= most
                return Block(session, min(pending, most), final)
            units = self._block_rule.size(
                pending, session.playback.ahead_s(now_s), unit_s, self._decode_time
            )
            if units:
                return Block(session, units, final=False)
        return None


def _deadline(session: Session, now_s: float) -> tuple[int, float]:
    """Replies not heard yet first, oldest first; then whoever's listener runs dry soonest."""
    ahead = session.playback.ahead_s(now_s)
    return (0, session.created_s) if ahead is None else (1, ahead)


def _comfortable(session: Session, now_s: float) -> bool:
    ahead = session.playback.ahead_s(now_s)
    return ahead is not None and ahead > COMFORT_S


def _text_rows(sessions: Sequence[Session]) -> list[Session]:
    """Rows that run ahead ride along with rows the speech waits for, or fill an idle step."""
    ready = [s for s in sessions if s.interleaver.text_ids and s.interleaver.wants_text]
    if any(s.interleaver.needs_text for s in ready):
        return ready
    waiting_for_sound = any(s.playback.started_s is None for s in sessions)
    return [] if waiting_for_sound else ready
