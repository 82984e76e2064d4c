"""Where questions come from: the microphone, sound files, or a pipe."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from omnispeech.audio.io import SAMPLE_RATE_HZ, decode_audio, pcm16_from_samples
from omnispeech.client import ClientError, read_sound, show
from omnispeech.errors import OmniSpeechError
from omnispeech.terminal.devices import Rate, find_sounddevice, microphone
from omnispeech.terminal.options import ChatOptions
from omnispeech.terminal.sent import BYTES_A_MS
from omnispeech.terminal.standard_input import lines, pieces, silent_keys
from omnispeech.terminal.talk import Talk

LONGEST_FILE_S = 500.0  # fits into a frame; the server's own limit is lower
SILENCE_AFTER_MS = 500  # more than what ends a turn
PIECE_MS = 20
LATE_S = 0.2  # a busy machine may catch up so much
EARPHONES = (
    "listening; Ctrl-C interrupts a reply, or ends. Use earphones: from a loudspeaker the replies "
    "would reach the microphone and interrupt themselves (or use --push-to-talk)"
)
NO_MICROPHONE = (
    "no microphone was found (it needs: pip install sounddevice; on Linux libportaudio2, too): "
    "files are asked instead"
)
HOLD = "Enter begins and ends what you say; Ctrl-C interrupts a reply, or ends"

Source = Callable[[Talk], Coroutine[Any, Any, None]]


def source_of(options: ChatOptions) -> tuple[Source, bool]:
    """What asks until there is nothing more to ask, and whether the server finds the turns."""
    if options.piped:
        if options.push_to_talk:
            return lambda talk: ask_pipe_whole(talk, options.rate_hz), False
        return lambda talk: ask_pipe(talk, options.rate_hz, options.silence_ms), True
    if options.files:
        return lambda talk: ask_files(talk, options.files), False
    device = find_sounddevice("input")
    if device is None:
        return ask_typed_files, False
    if options.push_to_talk:
        return lambda talk: ask_by_key(talk, device), False
    return lambda talk: ask_hands_free(talk, device), True


async def ask_files(talk: Talk, files: Iterable[Path]) -> None:
    """Each is a turn. One that cannot be asked is told, and the next is asked."""
    await talk.ready.wait()
    for path in files:
        await ask_file(talk, path)


async def ask_file(talk: Talk, path: Path) -> None:
    try:
        sound = decode_audio(read_sound(path), max_seconds=LONGEST_FILE_S)
    except (OmniSpeechError, OSError) as exc:
        talk.fail(str(exc))
        return
    await talk.ask(pcm16_from_samples(sound), path.name)
    await talk.quiet()


async def ask_typed_files(talk: Talk) -> None:
    await talk.ready.wait()
    talk.screen.line(NO_MICROPHONE)
    prompt(talk)
    async for line in lines(sys.stdin.fileno()):
        talk.prompting = False
        if line == "quit":
            break
        if line:
            await ask_file(talk, Path(line))
        else:
            show("type the name of a sound file, or quit\n")
        prompt(talk)
    else:
        show("\n")


def prompt(talk: Talk) -> None:
    """The live line makes room for what is typed."""
    talk.prompting = True
    talk.screen.leave()
    show("sound file, or quit: ")


async def ask_hands_free(talk: Talk, sounddevice: ModuleType) -> None:
    loop = asyncio.get_running_loop()
    await talk.ready.wait()
    talk.screen.line(EARPHONES)
    with silent_keys(), microphone(sounddevice, _in(loop, talk.questions.hear)):
        await asyncio.Event().wait()


async def ask_by_key(talk: Talk, sounddevice: ModuleType) -> None:
    """Enter begins a turn and ends it."""
    loop = asyncio.get_running_loop()
    await talk.ready.wait()
    talk.screen.line(HOLD)

    def hear(pcm: bytes) -> None:
        if talk.questions.open:
            talk.questions.hear(pcm)

    with silent_keys(), microphone(sounddevice, _in(loop, hear)):
        async for line in lines(sys.stdin.fileno()):
            if line == "quit":
                break
            press_or_release(talk)
        await talk.quiet()


def press_or_release(talk: Talk) -> None:
    if not talk.questions.open:
        talk.replies.interrupt()
        talk.questions.press()
    elif not talk.questions.release():
        talk.screen.line("that was too short; speak, then press Enter")


async def ask_pipe(talk: Talk, rate_hz: int, silence_ms: int) -> None:
    """At the pace of speech, as a microphone would: what comes faster waits. Silence follows, so
    that the last turn ends."""
    rate = Rate(rate_hz, SAMPLE_RATE_HZ)
    pace = Pace()
    await talk.ready.wait()
    async for piece in even_pieces(rate_hz):
        talk.questions.hear(rate.push(piece))
        await pace.wait()
    pieces_heard = pace.pieces
    for _ in range((silence_ms + SILENCE_AFTER_MS) // PIECE_MS):
        talk.questions.hear(bytes(PIECE_MS * BYTES_A_MS))
        await pace.wait()
    await talk.quiet()
    if not talk.questions.turns:
        raise ClientError(
            f"no speech was heard in {pieces_heard * PIECE_MS / 1000:.1f} s of sound; send raw "
            f"16-bit mono sound at {rate_hz} Hz, or give its --rate"
        )


class Pace:
    """One piece each PIECE_MS; time that was waited for the pipe is not caught up."""

    def __init__(self) -> None:
        self.pieces = 0
        self._due_s = 0.0

    async def wait(self) -> None:
        now_s = asyncio.get_running_loop().time()
        self.pieces += 1
        self._due_s = max(self._due_s, now_s - LATE_S) + PIECE_MS / 1000
        await asyncio.sleep(self._due_s - now_s)


async def ask_pipe_whole(talk: Talk, rate_hz: int) -> None:
    """All that comes until the end of the input is one turn."""
    rate = Rate(rate_hz, SAMPLE_RATE_HZ)
    await talk.ready.wait()
    pcm = b"".join([rate.push(piece) async for piece in even_pieces(rate_hz)])
    await talk.ask(pcm, "pipe")
    await talk.quiet()


async def even_pieces(rate_hz: int) -> AsyncIterator[bytes]:
    """Standard input in pieces of PIECE_MS; the last one may be shorter, in whole samples."""
    size = 2 * (rate_hz * PIECE_MS // 1000)
    rest = b""
    async for data in pieces(sys.stdin.fileno()):
        rest += data
        while len(rest) >= size:
            yield rest[:size]
            rest = rest[size:]
    if len(rest) > 1:
        yield rest[: len(rest) & ~1]


def _in(loop: asyncio.AbstractEventLoop, hear: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """To be called from the thread of a device."""

    def hand_over(pcm: bytes) -> None:
        with suppress(RuntimeError):  # the conversation is over
            loop.call_soon_threadsafe(hear, pcm)

    return hand_over
