"""Replies that share every model call: the engine without threads.

`open` a session for a request, `insert` it, call `step` until it is idle. Everything that comes
of it goes through the session's own `emit`.
"""

import hashlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TypeVar

from torch import Tensor

from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.events import Audio, Event, Message, Samples, Text, TurnRequest
from omnispeech.engine.interleave import Rules
from omnispeech.engine.pace import Average, BlockRule, LinearCost
from omnispeech.engine.prefix_cache import Position
from omnispeech.engine.runner import Models, Runner, unread
from omnispeech.engine.sampling import samplers
from omnispeech.engine.scheduler import Scheduler, SoundBlock
from omnispeech.engine.session import Session
from omnispeech.engine.tool_calls import described, described_call
from omnispeech.engine.vocoder import open_stream
from omnispeech.errors import AudioError, PromptTooLong, RequestError
from omnispeech.prompt import AUDIO, AUDIO_SLOT, PromptMessage

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


class Conversations:
    """Replies that share every model call."""

    def __init__(self, models: Models, config: EngineConfig, decoder: DecoderConfig) -> None:
        self.models = models.language
        self.unsupported = models.language.prompt.unsupported  # as in EngineStatus
        self.speech_decoder = models.decoder
        self.config = config
        of_model = models.language.lm.config.llm.max_position_embeddings
        self.context_length = min(config.context_length, of_model)
        self.decoder_config = decoder
        # compatible rules make an audio's last vector depend on the others of its request
        reuse = config.reuse_prefixes and not config.compatible
        self.runner = Runner(models.language, config.kv_tokens, reuse_prefixes=reuse)
        self.steps = 0
        self.unit_s = Average()
        self._decode_cost = LinearCost()
        flow = models.decoder.flow
        decoder.check_step(flow.config.encoder.block_size)
        frame_s = models.decoder.hift.config.hop / models.decoder.sample_rate_hz
        self.unit_audio_s = flow.frames(100) * frame_s / 100
        self.scheduler = Scheduler(
            max_running=config.max_conversations,
            prefill_tokens=config.prefill_tokens,
            enter=self._enter,
            leave=self.runner.leave,
            block_rule=BlockRule(
                step=flow.config.encoder.block_size,
                first=decoder.first_block,
                most=decoder.max_block,
                unit_audio_s=self.unit_audio_s,
                held_back_s=decoder.overlap_frames * frame_s,
            ),
            decode_cost=self._decode_cost,
            fixed_block=decoder.compatible_block if decoder.streaming == "compatible" else 0,
        )

    def open(
        self,
        request: TurnRequest,
        emit: Callable[[Event | Exception], None],
        created_s: float | None = None,
    ) -> Session:
        """A session for `request`, not yet inserted; its prompt is ready, and the features
        of what was not heard before.

        created_s: when the request came, by time.perf_counter; None: now.
        Raises RequestError if the request can not be answered, PromptTooLong if a shorter one
        could be. Safe from any thread.
        """
        created_s = time.perf_counter() if created_s is None else created_s
        models = self.models
        audios = [p.samples for m in request.messages for p in m.content if isinstance(p, Audio)]
        prompt = models.prompt.build(
            [_prompt_message(m) for m in request.messages], [described(t) for t in request.tools]
        )
        script = models.prompt.reply_ids(request.script) if request.script is not None else []
        valid = [models.front_end.valid_frames(len(samples)) for samples in audios]
        lengths = [self._vectors(*pair) for pair in zip(audios, valid, strict=True)]
        key = position_keys(prompt, audios, lengths)
        rules = self._rules(request, len(key), script)
        features = self._features(audios)
        _, known = unread(prompt, lengths, self.runner.prefixes.known(key))
        for compute in features[known:]:
            compute()
        seed = request.seed if request.seed is not None else random.getrandbits(63)
        text_sampler, speech_sampler = samplers(
            request, seed, models.text_top_k, models.speech_top_k
        )
        return Session(
            request=request,
            rules=rules,
            prompt=prompt,
            features=features,
            valid_frames=valid,
            audio_lengths=lengths,
            key=key,
            text_sampler=text_sampler,
            speech_sampler=speech_sampler,
            text_stream=models.prompt.text_stream(),
            script=script,
            unit_audio_s=self.unit_audio_s,
            seed=seed,
            emit=emit,
            created_s=created_s,
        )

    def _enter(self, session: Session) -> bool:
        if not self.runner.enter(session):
            return False
        session.queue_s = session.elapsed_s
        try:
            if session.rules.speech:
                session.vocoder = open_stream(
                    self.speech_decoder, self.decoder_config, session.seed
                )
        except Exception:
            self.runner.leave(session)
            raise
        return True

    def _features(self, audios: Sequence[Samples]) -> list[Callable[[], Tensor]]:
        """Computed when first asked for: those of a sound that was heard before are not needed.

        The original pads every audio of a request to the longest.
        """
        longest = max(map(len, audios), default=0) if self.config.compatible else 0
        compute = partial(self.models.front_end.features, longest=longest)
        return [cache(partial(compute, samples)) for samples in audios]

    def _vectors(self, samples: Samples, valid_frames: int) -> int:
        """Prompt positions that an audio takes, known before it is heard."""
        lm = self.models.lm
        count = lm.audio_adapter.output_length(lm.audio_encoder_model.output_length(valid_frames))
        if not count:
            raise AudioError(
                f"an audio of {len(samples)} samples is too short to be heard; send 0.1 s or more"
            )
        return count

    def _rules(self, request: TurnRequest, prompt_length: int, script: Sequence[int]) -> Rules:
        span = self.models.lm.config
        rules = Rules(
            read=span.text_span,
            write=span.unit_span,
            text_limit=self._text_limit(request, prompt_length, script),
            unit_limit=self.models.unit_limit,
            text_end=frozenset(script[-1:]) or self.models.text_end,
            speech_end=self.models.speech_end,
            run_ahead=0 if self.config.compatible else self.config.run_ahead,
            speech=request.speech,
            compatible=self.config.compatible,
        )
        if (needed := rules.speech_positions) > self.config.kv_tokens:
            raise RequestError(
                f"the reply may need {needed} speech positions, the server has "
                f"{self.config.kv_tokens}; ask for fewer max_new_tokens"
            )
        return rules

    def _text_limit(self, request: TurnRequest, prompt_length: int, script: Sequence[int]) -> int:
        limit = self.config.max_new_tokens
        if len(script) > limit:
            raise RequestError(
                f"the text to be spoken has {len(script)} tokens, its end included; send at most "
                f"{limit} at once, or start the server with larger max_new_tokens"
            )
        room = self.context_length - prompt_length
        wanted = len(script) or min(request.max_new_tokens, limit)
        least = len(script) or self._least_room(wanted, request)
        if room < least:
            raise PromptTooLong(
                f"the prompt has {prompt_length} positions, the context has "
                f"{self.context_length}; send a shorter conversation{self._way_to_more}",
                positions=prompt_length,
                room=self.context_length - least,
            )
        return min(wanted, room)

    def _least_room(self, wanted: int, request: TurnRequest) -> int:
        """A reply that breaks off is worth less than the oldest turns of a long conversation."""
        return min(wanted, self.context_length // 4) if request.can_shorten else 1

    @property
    def _way_to_more(self) -> str:
        if self.context_length < self.config.context_length:
            return ", the model knows no longer ones"
        return ", or start the server with a larger context_length"

    @property
    def idle(self) -> bool:
        return not self.scheduler.running and not self.scheduler.waiting

    def insert(self, session: Session) -> None:
        self.scheduler.insert(session)

    def step(self) -> bool:
        """One call of each model, as far as there is work for it; False if there was none."""
        began = time.perf_counter()
        self.scheduler.update()
        worked = [self._hear(began), self._write(began), self._sound()]
        self.steps += any(worked)
        return any(worked)

    def _hear(self, now_s: float) -> bool:
        session = self.scheduler.to_hear(now_s)
        if session is None:
            return False
        with session.own_errors():
            self.runner.listen(session)
        return True

    def _write(self, began: float) -> bool:
        """Text first: its states may be what the speech waits for."""
        turns = self.scheduler.llm_turns(began)
        _together(turns, self.runner.run_llm, lambda turn: turn.session)
        rows = self.scheduler.speech_rows(began)
        _together(rows, self.runner.run_speech, lambda session: session)
        if rows:
            self.unit_s.add(time.perf_counter() - began)
        return bool(turns or rows)

    def _sound(self) -> bool:
        block = self.scheduler.block(time.perf_counter(), self.unit_s.value)
        if block is None:
            return False
        with block.session.own_errors():
            self._decode(block)
        return True

    def _decode(self, block: SoundBlock) -> None:
        window = block.session.vocoder.context + block.units
        began = time.perf_counter()
        self.runner.decode(block)
        if block.units:  # without new ones only what was held back is vocoded
            self._decode_cost.add(window, time.perf_counter() - began)

    def forget_speeds(self) -> None:
        """What was measured so far does not count, as when kernels were compiled meanwhile."""
        self.unit_s.value = 0.0
        self._decode_cost.clear()


def _together(
    items: Sequence[Item], run: Callable[[Sequence[Item]], None], of: Callable[[Item], Session]
) -> None:
    """All in one call. If it fails, one by one: an error reaches its own caller and nobody else."""
    if not items or _succeeds(items, run):
        return
    for item in items:  # the failed call's tensors are gone by now
        with of(item).own_errors():
            run([item])


def _succeeds(items: Sequence[Item], run: Callable[[Sequence[Item]], None]) -> bool:
    try:
        run(items)
    except Exception:
        logger.warning("a call for %d replies failed", len(items), exc_info=True)
        return False
    return True


def position_keys(
    prompt: Sequence[int], audios: Sequence[Samples], lengths: Sequence[int]
) -> list[Position]:
    """What stands at each position of the spliced prompt: equal keys mean equal vectors."""
    waiting = zip(audios, lengths, strict=True)
    keys: list[Position] = []
    for token in prompt:
        if token == AUDIO_SLOT:
            samples, length = next(waiting)
            digest = hashlib.blake2b(samples.tobytes(), digest_size=16).digest()
            keys += [(digest, place) for place in range(length)]
        else:
            keys.append(token)
    return keys


def _prompt_message(message: Message) -> PromptMessage:
    parts = (part.text if isinstance(part, Text) else AUDIO for part in message.content)
    calls = tuple(map(described_call, message.tool_calls))
    return PromptMessage(message.role, tuple(parts), calls)
