"""The thread that owns the device, behind the asyncio interface of `engine.events`.

Handlers put sessions in and take events out. Nothing else touches the models.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np

from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import (
    INPUT_RATE_HZ,
    Audio,
    AudioDelta,
    Done,
    EngineStatus,
    Event,
    Message,
    TurnRequest,
)
from omnispeech.engine.runner import Models
from omnispeech.engine.session import Session
from omnispeech.errors import GenerationError, NotReady, OmniSpeechError, Overloaded
from omnispeech.phases import Phases, peak_memory

logger = logging.getLogger(__name__)

IDLE_S = 0.05  # how often an idle thread looks for callers that have left
CLOSE_S = 10.0  # a step that takes longer is not waited for
LOADING = "the models are still being loaded; try again later"
STOPPING = "the server is stopping"
WARM_UP = TurnRequest(
    messages=(Message("user", (Audio(np.zeros(INPUT_RATE_HZ // 2, np.float32)),)),),
    max_new_tokens=16,
    seed=0,
)


class Worker:
    """Implements SpeechEngine. `load` runs in the thread, so that a server can already answer."""

    def __init__(
        self,
        load: Callable[[], Models],
        config: EngineConfig | None = None,
        decoder: DecoderConfig | None = None,
        phases: Phases | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self._load = load
        self._decoder = decoder or DecoderConfig()
        self._inbox: queue.SimpleQueue[Session | None] = queue.SimpleQueue()
        self._conversations: Conversations | None = None
        self._ready = False
        self._failure: str | None = None
        self._phases = phases or Phases()
        self._open = 0  # replies taken and not yet ended
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """`on_failure` is called, in the thread, if the engine can never be ready."""
        self._on_failure = on_failure
        self._thread.start()

    def close(self) -> bool:
        """Ends the thread after its current step; replies under way are told.

        Whether it has ended: one that is still loading is not waited for.
        """
        self._inbox.put(None)
        if self._ready or self._failure:
            self._thread.join(CLOSE_S)
        return not self._thread.is_alive()

    @property
    def conversations(self) -> Conversations:
        if self._conversations is None:
            raise NotReady(self._failure or LOADING)
        return self._conversations

    @property
    def sample_rate_hz(self) -> int:
        return self.conversations.speech_decoder.sample_rate_hz

    def status(self) -> EngineStatus:
        conversations = self._conversations
        running = len(conversations.scheduler.running) if conversations else 0
        return EngineStatus(
            ready=self._ready,
            running=running,
            waiting=max(0, self._open - running),
            max_running=self.config.max_conversations,
            max_waiting=self.config.max_waiting,
            failure=self._failure,
            phases=self._phases.done(),
            kv_tokens=self.config.kv_tokens,
            kv_used=conversations.runner.llm_cache.used_tokens if conversations else 0,
            device_bytes=conversations.runner.device_bytes if conversations else 0,
            unsupported=conversations.unsupported if conversations else {},
        )

    async def answer(self, request: TurnRequest) -> AsyncGenerator[Event, None]:
        created_s = time.perf_counter()
        if not self._ready:
            raise NotReady(self._failure or LOADING)
        with self._place():
            loop = asyncio.get_running_loop()
            inbox: asyncio.Queue[Event | Exception] = asyncio.Queue()

            def emit(event: Event | Exception) -> None:
                with suppress(RuntimeError):  # the caller's loop is closed: it is gone
                    loop.call_soon_threadsafe(inbox.put_nowait, event)

            session = await asyncio.to_thread(self.conversations.open, request, emit, created_s)
            try:
                self._submit(session)
                event: Event | Exception | None = None
                while not isinstance(event, Done):
                    event = await inbox.get()
                    if isinstance(event, OmniSpeechError):
                        raise event
                    if isinstance(event, Exception):
                        raise GenerationError(f"the reply failed: {event}") from event
                    yield event
            finally:
                session.cancelled = True  # if the caller is gone: no more work on it

    def _submit(self, session: Session) -> None:
        with self._lock:
            if not self._ready:
                raise NotReady(self._failure or STOPPING)
            self._inbox.put(session)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """A place among those who talk or wait; refuses at once if all are taken."""
        most = self.config.max_conversations + self.config.max_waiting
        with self._lock:
            if self._open >= most:
                raise Overloaded(
                    f"{self.config.max_conversations} conversations are running and "
                    f"{self.config.max_waiting} wait; try again in a second"
                )
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1

    def _run(self) -> None:
        try:
            models = self._load()
            with self._phases.measure("take memory of conversations"):
                self._conversations = Conversations(models, self.config, self._decoder)
            with self._phases.measure("warm up"):
                warm_up(self._conversations)
            logger.info("ready; peak host memory %.1f GB", peak_memory() / 1e9)
            self._ready = True
            self._serve(self._conversations)
        except Exception as error:
            logger.exception("the engine ends")
            self._failure = str(error) or type(error).__name__
            self._on_failure()
        finally:
            self._say_goodbye()

    def _serve(self, conversations: Conversations) -> None:
        busy = False
        while self._take(conversations, wait_s=0.0 if busy else IDLE_S):
            busy = conversations.step()

    def _take(self, conversations: Conversations, wait_s: float) -> bool:
        """Sessions from the inbox into the engine, waiting up to `wait_s` for one; False: stop."""
        while True:
            try:
                session = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            except queue.Empty:
                return True
            if session is None:
                return False
            conversations.insert(session)
            wait_s = 0.0

    def _say_goodbye(self) -> None:
        """Nobody is left waiting for an engine that has ended."""
        with self._lock:
            self._ready = False
        sessions = [] if self._conversations is None else self._conversations.scheduler.everybody
        with suppress(queue.Empty):
            while True:
                if session := self._inbox.get_nowait():
                    sessions.append(session)
        for session in sessions:
            if not session.over:
                session.fail(GenerationError(self._failure or STOPPING))


def warm_up(conversations: Conversations) -> None:
    """A turn up to its second block, twice: the first compiles kernels, the second tells how fast
    the machine is. Sound must come out."""
    for _ in range(2):
        conversations.forget_speeds()
        if not _first_blocks(conversations):
            raise GenerationError("the warm-up turn made no sound; the checkpoint may be damaged")


def _first_blocks(conversations: Conversations) -> bool:
    """Whether a turn that nothing but its limits can end makes sound in its first two blocks."""
    events: list[Event | Exception] = []
    session = conversations.open(WARM_UP, events.append)
    rules = replace(session.rules, text_end=frozenset(), speech_end=frozenset())
    session.interleave(rules)
    conversations.insert(session)
    blocks: list[AudioDelta] = []
    while not conversations.idle:
        conversations.step()
        blocks = [event for event in events if isinstance(event, AudioDelta)]
        session.cancelled = len(blocks) >= 2
    for event in events:
        if isinstance(event, Exception):
            raise event
    return any(np.frombuffer(block.pcm, "<i2").any() for block in blocks)
