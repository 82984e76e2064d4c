"""Text tokens of one reply -> what its caller is told. No torch here."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omnispeech.engine.events import TextDelta, ToolCall
from omnispeech.engine.interleave import Interleaver
from omnispeech.engine.tool_calls import CallReader

if TYPE_CHECKING:
    from omnispeech.prompt import TextStream


class ReplyText:
    """Tells the interleaver what is spoken, and the caller from when on a text can be heard."""

    def __init__(
        self, stream: "TextStream", turn: Interleaver, unit_audio_s: float, *, calls: bool
    ) -> None:
        """unit_audio_s: seconds of sound per unit; calls: the model may call functions."""
        self._stream = stream
        self._turn = turn
        self._unit_audio_s = unit_audio_s
        self._calls = CallReader() if calls else None
        self._first_untold = 0  # the first token whose text is not told as a whole

    def push(self, token: int) -> list[TextDelta | ToolCall]:
        """The LLM chose `token`."""
        text = self._stream.push([token])
        pieces = [text] if self._calls is None else self._calls.push(text)
        self._advance(token)
        told = self._events(pieces)
        here = len(self._turn.text_ids)
        if not (self._stream.holds or (self._calls and self._calls.holds)):
            self._first_untold = here
        elif told:
            self._first_untold = here - 1
        return told

    def _advance(self, token: int) -> None:
        if self._calls is not None and self._calls.begun:
            self._turn.cut()
        self._turn.add_text(token, held=self._calls is not None and self._calls.undecided)

    def finish(self) -> list[TextDelta | ToolCall]:
        """No more tokens will come. What is left is told once."""
        text = self._stream.finish()
        if self._calls is None:
            return self._events([text])
        return self._events([*self._calls.push(text), *self._calls.finish()])

    def _events(self, pieces: Sequence[str | ToolCall]) -> list[TextDelta | ToolCall]:
        from_s = self._from_s()
        return [
            TextDelta(piece, from_s) if isinstance(piece, str) else piece
            for piece in pieces
            if piece
        ]

    def _from_s(self) -> float:
        """A state is read at the beginning of its span, when the spans before were written (spec:
        opens2s 11). The compatible mode may write less."""
        if self._turn.silent:
            return 0.0
        rules = self._turn.rules
        return self._first_untold // rules.read * rules.write * self._unit_audio_s
