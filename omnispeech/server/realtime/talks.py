"""The live conversations of one server: their places, and those that wait for a lost client."""

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass

from omnispeech.config import ServerConfig, TalkConfig
from omnispeech.errors import TooManyRequests
from omnispeech.server.access.callers import CALLER, Caller
from omnispeech.server.admission import STOPPING, Admission
from omnispeech.server.metrics import TalkEnd, TalkFigures
from omnispeech.server.realtime.connection import Connection
from omnispeech.server.realtime.talk import LATER, NORMAL, RESTART, Close, Talk


class Refused(Exception):
    """A connection that begins no talk."""

    def __init__(self, close: Close) -> None:
        super().__init__(close.reason)
        self.close = close


@dataclass(eq=False)
class Seat:
    """A talk and its place. connection: None while it is parked."""

    talk: Talk
    caller: Caller
    place: ExitStack
    connection: Connection | None = None
    expiry: asyncio.TimerHandle | None = None


class Talks:
    def __init__(
        self, engine: Admission, config: ServerConfig, talk_config: TalkConfig, figures: TalkFigures
    ) -> None:
        self._engine = engine
        self._config = config
        self._talk_config = talk_config
        self._figures = figures
        self._seats: dict[str, Seat] = {}  # parked ones in the order of parking
        engine.on_stop(self._farewell)

    def begin(self) -> Seat:
        """A new talk. Raises Refused."""
        self._check_open()
        place = ExitStack()
        caller = CALLER.get()
        self._make_room()
        try:
            place.enter_context(caller.talk())
        except TooManyRequests as exc:
            raise Refused(Close(LATER, str(exc), "policy")) from exc
        talk = Talk(self._engine, self._config, self._talk_config, self._figures)
        seat = self._seats[talk.id] = Seat(talk, caller, place)
        self._figures.talk_opened()
        return seat

    def find(self, session_id: str) -> Seat | None:
        """The talk of that id, if the caller is the one who began it."""
        seat = self._seats.get(session_id)
        return seat if seat and seat.caller.account is CALLER.get().account else None

    def check_resumable(self) -> None:
        """Raises Refused."""
        if self._engine.stopping:
            raise Refused(Close(RESTART, STOPPING, "stopping"))

    async def serve(self, seat: Seat, connection: Connection, *, resumed: bool) -> Close:
        """Until the connection has ended; then the talk is parked, or over."""
        await self._take_up(seat, connection)
        try:
            close = await connection.run(resumed=resumed)
        except BaseException:
            connection.gone.set()
            if seat.connection is connection:
                self._end(seat, "failed")
            raise
        if seat.connection is connection:
            self._part(seat, close)
        return close

    async def _take_up(self, seat: Seat, connection: Connection) -> None:
        """Another connection that still has the talk lets go of it."""
        old, seat.connection = seat.connection, connection
        if old:
            old.end(Close(NORMAL, "the talk was taken up by another connection", "lost"))
            await old.left.wait()
        if seat.expiry:
            seat.expiry.cancel()
            seat.expiry = None
            self._figures.talk_resumed()

    def _part(self, seat: Seat, close: Close) -> None:
        seat.connection = None
        if close.end != "lost" or not self._talk_config.resume_s or self._engine.stopping:
            self._end(seat, close.end)
            return
        self._figures.talk_parked()
        self._seats[seat.talk.id] = self._seats.pop(seat.talk.id)
        loop = asyncio.get_running_loop()
        seat.expiry = loop.call_later(self._talk_config.resume_s, self._end, seat, "lost")

    def _end(self, seat: Seat, reason: TalkEnd) -> None:
        """Its memory and its place are free."""
        if self._seats.pop(seat.talk.id, None) is None:
            return
        self._figures.talk_closed(reason, parked=seat.expiry is not None)
        if seat.expiry:
            seat.expiry.cancel()
        seat.place.close()

    def _check_open(self) -> None:
        if self._engine.stopping:
            raise Refused(Close(RESTART, STOPPING, "stopping"))
        status = self._engine.status()
        if not status.ready:
            reason = status.failure or "the models are still being loaded; try again later"
            raise Refused(Close(LATER, reason, "policy"))

    def _make_room(self) -> None:
        """Who waits for a lost client longest makes room for one who is there."""
        if len(self._seats) < self._talk_config.max_talks:
            return
        parked = next((seat for seat in self._seats.values() if seat.expiry), None)
        if parked is None:
            most = self._talk_config.max_talks
            reason = f"all {most} places (max_talks) are taken; try again later"
            raise Refused(Close(LATER, reason, "policy"))
        self._end(parked, "lost")

    async def _farewell(self) -> None:
        """Returns when all have gone."""
        for seat in [*self._seats.values()]:
            if seat.expiry:
                self._end(seat, "stopping")
            else:
                seat.talk.stop_soon()
        connections = [seat.connection for seat in self._seats.values() if seat.connection]
        await asyncio.gather(*(connection.gone.wait() for connection in connections))
