"""One reply, told in the order of the protocol: one response.created, one response.done."""

from collections.abc import Callable
from typing import Any, Literal

from omnispeech.engine.events import AudioDelta, Done, Event, TextDelta, ToolCall
from omnispeech.errors import OmniSpeechError
from omnispeech.server.realtime.conversation import Conversation
from omnispeech.server.realtime.items.kinds import AssistantMessage, FunctionCall, Item
from omnispeech.server.realtime.protocol.ids import new_id
from omnispeech.server.realtime.protocol.refusals import ProtocolError, response_error
from omnispeech.server.realtime.replies.output_message import OutputMessage
from omnispeech.server.realtime.settings.session_settings import ResponseSettings

Status = Literal["in_progress", "completed", "incomplete", "cancelled", "failed"]
Reason = Literal["turn_detected", "client_cancelled"]

ABANDONED = ProtocolError("the talk ended before the reply was whole", code="session_ended")


class Response:
    """One out of band leaves no trace in the conversation.

    on_sent: called when the client has got all of it.
    """

    def __init__(
        self,
        conversation: Conversation,
        settings: ResponseSettings,
        from_hz: int,
        on_sent: Callable[["Response"], None],
    ) -> None:
        self.id = new_id("resp")
        self.status: Status = "in_progress"
        self.out_of_band = settings.out_of_band
        self._conversation = conversation
        self._settings = settings
        self._from_hz = from_hz
        self._on_sent = on_sent
        self._details: dict[str, Any] | None = None
        self._usage: dict[str, Any] | None = None
        self._output: list[Item] = []
        self._message: OutputMessage | None = None

    def begin(self) -> None:
        self._conversation.tell("response.created", response=self._described())

    def take(self, event: Event) -> None:
        """What the engine has made; nothing once the response has ended."""
        if self.status != "in_progress":
            return
        match event:
            case TextDelta():
                self._spoken().write(event)
            case AudioDelta():
                self._spoken().speak(event)
            case ToolCall():
                self._call(event)
            case Done():
                self._finish(event)

    def stop(self, reason: Reason) -> bool:
        """Nothing more of it is told but its end. False: all of it has been sent already."""
        return self._break_off("cancelled", {"type": "cancelled", "reason": reason})

    def abandon(self) -> None:
        """As `stop`, because the connection ends."""
        self._break_off("failed", {"type": "failed", "error": response_error(ABANDONED)})

    def _break_off(self, status: Status, details: dict[str, Any]) -> bool:
        if self.status == "cancelled" or (self.status != "in_progress" and self._all_sent()):
            return False
        self._conversation.outbox.take_back(self)
        if self._message:
            self._message.forget_unsent()
        self._end(status, details)
        self._tell_cut()
        return True

    def fail(self, exc: OmniSpeechError) -> None:
        if self.status == "in_progress":
            self._end("failed", {"type": "failed", "error": response_error(exc)})

    @property
    def played_s(self) -> float:
        """When a client that played all at once has played it, on the event loop's clock."""
        return self._message.played_s if self._message else 0.0

    def _all_sent(self) -> bool:
        return self._message is None or self._message.all_sent

    def _finish(self, done: Done) -> None:
        self._usage = usage(done)
        if self._message:
            self._message.finish()
        if done.text_finish == done.speech_finish == "stop":
            self._end("completed", None)
        else:
            self._end("incomplete", {"type": "incomplete", "reason": "max_output_tokens"})

    def _spoken(self) -> OutputMessage:
        """The message of this reply; told when its first piece is there."""
        if self._message is None:
            item = AssistantMessage(new_id("item"), speech=self._settings.speech)
            place = self._add(item)
            self._message = OutputMessage(
                item, place, self, self._conversation.outbox, self._settings, self._from_hz
            )
            self._message.open()
        return self._message

    def _call(self, call: ToolCall) -> None:
        calls = [item for item in self._output if isinstance(item, FunctionCall)]
        if calls and not self._settings.parallel_tool_calls:
            return
        item = FunctionCall(new_id("item"), new_id("call"), call.name, "")
        item.status = "in_progress"
        place: dict[str, Any] = self._add(item) | {"item_id": item.id, "call_id": item.call_id}
        kind, tell = "response.function_call_arguments", self._conversation.tell
        tell(f"{kind}.delta", **place, delta=call.arguments)
        tell(f"{kind}.done", **place, name=call.name, arguments=call.arguments)
        item.arguments = call.arguments
        self._close(item, "completed")  # not to be taken back: it was told whole

    def _add(self, item: Item) -> dict[str, Any]:
        """Gives the fields by which events name the item's place."""
        place: dict[str, Any] = {"response_id": self.id, "output_index": len(self._output)}
        self._output.append(item)
        self._conversation.tell("response.output_item.added", **place, item=item.described())
        if not self.out_of_band:
            self._conversation.add(item)
        return place

    def _close(
        self, item: Item, status: Literal["completed", "incomplete"], of: object = None
    ) -> None:
        item.status = status
        if not self.out_of_band:
            self._conversation.finish(item, of)
        place: dict[str, Any] = {
            "response_id": self.id,
            "output_index": self._output.index(item),
        }
        told = item.described()
        self._conversation.tell("response.output_item.done", of, **place, item=told)

    def _end(self, status: Status, details: dict[str, Any] | None) -> None:
        """What it tells is taken back together with the deltas before it."""
        self.status, self._details = status, details
        if self._message:
            if status in ("cancelled", "failed"):
                self._message.cut()
            self._message.close()
            self._close(
                self._message.item, "completed" if status == "completed" else "incomplete", self
            )
        told = self._described()
        self._conversation.tell("response.done", self, lambda: self._on_sent(self), response=told)

    def _tell_cut(self) -> None:
        """The item is in the conversation, with less than was made."""
        if self._message is None or self.out_of_band or not self._settings.speech:
            return
        if self._message.item.id in self._conversation.items:
            self._conversation.tell(
                "conversation.item.truncated",
                item_id=self._message.item.id,
                content_index=0,
                audio_end_ms=round(self._message.sent_ms),
            )

    def _described(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": self.status,
            "status_details": self._details,
            "output": [item.described() for item in self._output],
            "conversation_id": None if self.out_of_band else self._conversation.id,
            **self._settings.described(),
            "usage": self._usage,
        }


def usage(done: Done) -> dict[str, Any]:
    spoken = done.text_tokens + done.units
    return {
        "total_tokens": done.prompt_tokens + spoken,
        "input_tokens": done.prompt_tokens,
        "output_tokens": spoken,
        "input_token_details": {
            "text_tokens": done.prompt_tokens - done.audio_tokens,
            "audio_tokens": done.audio_tokens,
            "image_tokens": 0,
            "cached_tokens": done.cached_tokens,
        },
        "output_token_details": {"text_tokens": done.text_tokens, "audio_tokens": done.units},
    }
