"""WebSocket /v1/realtime."""

from fastapi import APIRouter, WebSocket

from omnispeech.logs import CONVERSATION
from omnispeech.server.realtime.connection import Connection, say_goodbye
from omnispeech.server.realtime.outbox import Outbox
from omnispeech.server.realtime.protocol.refusals import ProtocolError, error_event
from omnispeech.server.realtime.talk import POLICY, Close
from omnispeech.server.realtime.talks import Refused, Seat, Talks
from omnispeech.server.tracing import Tracing

SUBPROTOCOL = "realtime"
TRANSCRIPTION_ONLY = (
    "intent=transcription is not offered; leave it out and read the transcripts of a conversation"
)
NO_CALLS = "call_id belongs to WebRTC and SIP, which are not offered; leave it out"
GONE = "no talk of that id waits for its client; connect without resume for a new one"


def realtime_routes(talks: Talks, tracing: Tracing) -> APIRouter:
    router = APIRouter()

    @router.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        """Every refusal is a close code with its reason: a client sees no other."""
        offered = socket.scope["subprotocols"]
        await socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        try:
            seat = await seat_for(socket, talks)
        except Refused as refused:
            await say_goodbye(socket, refused.close)
            return
        CONVERSATION.set(seat.talk.id)
        with tracing.talk(seat.talk.id):
            connection = Connection(socket, seat.talk)
            resumed = "resume" in socket.query_params
            close = await talks.serve(seat, connection, resumed=resumed)
            await connection.goodbye(close)

    return router


async def seat_for(socket: WebSocket, talks: Talks) -> Seat:
    """Raises Refused."""
    asked = socket.query_params
    if asked.get("intent", "conversation") == "transcription":
        raise Refused(Close(POLICY, TRANSCRIPTION_ONLY, "policy"))
    if "call_id" in asked:
        raise Refused(Close(POLICY, NO_CALLS, "policy"))
    if "resume" not in asked:
        return talks.begin()
    talks.check_resumable()
    seat = talks.find(asked["resume"])
    if seat is None:
        await tell_gone(socket)
        raise Refused(Close(POLICY, GONE, "policy"))
    return seat


async def tell_gone(socket: WebSocket) -> None:
    outbox = Outbox(socket)
    outbox.put(error_event(ProtocolError(GONE, code="session_expired", param="resume")))
    outbox.close()
    await outbox.run()
