"""What a client lets the conversation hear, and whose turn it is by that."""

import asyncio
from collections.abc import AsyncIterator

from omnispeech.audio.vad import SpeechDetector
from omnispeech.engine.events import Samples
from omnispeech.server.realtime.hearing.input_audio import InputAudio
from omnispeech.server.realtime.hearing.turn_detection import TurnDetector, TurnEvent
from omnispeech.server.realtime.protocol.refusals import buffer_empty
from omnispeech.server.realtime.settings.session_settings import SessionSettings

PIECE_S = 0.5  # that is listened to at a time
SHORTEST_MS = 90  # of a commit: 100, of which the resampler may still hold some


class Hearing:
    """The input audio buffer, and the detector of turns if the session has one."""

    def __init__(self, settings: SessionSettings, max_audio_s: float, speculate_ms: int) -> None:
        self._max_audio_s = max_audio_s
        self._speculate_ms = speculate_ms
        self._settings = settings
        self._audio = InputAudio(settings.input_format, max_audio_s)
        self._detector: TurnDetector | None = None

    @property
    def clock_ms(self) -> int:
        return self._audio.clock_ms

    @property
    def speaking(self) -> bool:
        return self._detector is not None and self._detector.speaking

    async def change(self, settings: SessionSettings) -> None:
        """From no detection to one, what is held is forgotten: no turn to come begins in it.

        Raises Unsupported if turns are to be detected and what that needs is not installed.
        """
        self._audio.change_format(settings.input_format)
        if settings.turn_detection is None:
            self._detector = None
        elif self._detector is not None:
            self._detector.change(settings.turn_detection)
        else:
            self._detector = TurnDetector(
                settings.turn_detection,
                self._speculate_ms,
                await asyncio.to_thread(SpeechDetector),
                start_ms=self._audio.clock_ms,
                longest_ms=round(self._max_audio_s * 1000),
            )
            self._audio.forget(self._detector.needed_from_ms)
        # the detector ends a turn at max_audio_s; until it has seen that, a piece more is held
        self._audio.max_s = self._max_audio_s + (2 * PIECE_S if self._detector else 0.0)
        self._settings = settings

    async def append(self, sound: bytes) -> AsyncIterator[TurnEvent]:
        """Off the event loop, in order. Raises AudioError if the buffer would hold too much: then
        nothing is kept of `sound`, or with a detector of the piece that was too much."""
        if self._detector is None:
            await asyncio.to_thread(self._audio.append, sound)
            return
        for piece in self._settings.input_format.pieces(sound, PIECE_S):
            for event in await asyncio.to_thread(self._listen, self._detector, piece):
                yield event
            if self._detector:
                self._audio.forget(self._detector.needed_from_ms)

    def _listen(self, detector: TurnDetector, piece: bytes) -> list[TurnEvent]:
        return detector.push(self._audio.append(piece))

    def peek(self, from_ms: int, to_ms: int) -> Samples:
        return self._audio.peek(from_ms, to_ms)

    def take(self, from_ms: int, to_ms: int) -> Samples:
        return self._audio.take(from_ms, to_ms)

    def held(self) -> Samples:
        """[N]: all that a commit takes. Raises ProtocolError if that is nearly nothing."""
        if self._audio.held_ms < SHORTEST_MS:
            raise buffer_empty(self._audio.held_ms)
        return self._audio.held()

    def clear(self) -> None:
        self._audio.clear()
        if self._detector:
            self._detector.reset(self._audio.clock_ms)
