"""Calibration with sound: what the two language models of OpenS2S read in a conversation.

The LLM reads its prompt template with the sound of the user in it, then its own reply. The speech
LM reads states of the LLM and its own units: both are only there once the models have answered.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from omnispeech.audio.features import MelConfig, log_mel
from omnispeech.audio.resample import Samples
from omnispeech.calibration.items import Conversation, Item, Sound, Turn
from omnispeech.calibration.samples import Calibration, Collector
from omnispeech.calibration.tokens import TextTokens
from omnispeech.checkpoint.files import assign_weights, build_on_meta
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.shards import Shards
from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import Audio, Event, Message, Text, TurnRequest
from omnispeech.engine.runner import Models
from omnispeech.engine.scheduler import LLMTurn
from omnispeech.engine.session import Session
from omnispeech.errors import ConfigError, PromptTooLong, RequestError
from omnispeech.json_file import read_json
from omnispeech.models.omnispeech import OmniSpeech, OmniSpeechConfig
from omnispeech.models.speech_lm import SpeechLM
from omnispeech.models.wavlm import WavLMConfig
from omnispeech.prompt import AUDIO, AUDIO_SLOT, PromptBuilder, PromptMessage

logger = logging.getLogger(__name__)

AUDIO_PARTS = ("audio_encoder_model", "audio_adapter")
CONTEXT_LENGTH = 4096  # of a conversation that the speech LM is calibrated with
LOGGED = 20  # items after which the log says how far it is: on a CPU a clip takes seconds


class Ears:
    """Audio encoder and adapter of an OpenS2S directory; no byte of another tensor is read."""

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        """Raises CheckpointError if their tensors are not there, or not as config.json says."""
        config = OmniSpeechConfig.from_dict(read_json(directory / "config.json"))
        if isinstance(config.audio_encoder, WavLMConfig):
            raise ConfigError(
                f"{directory} hears by a WavLM, and sound is heard here by the published encoder "
                "alone; calibrate on text with --calib-text"
            )
        self._mel = MelConfig.from_dict(read_json(directory / "audio/preprocessor_config.json"))
        self._model = cast(OmniSpeech, build_on_meta(lambda: OmniSpeech(config)))
        shards = Shards(directory, device)
        for part in AUDIO_PARTS:
            names = [name for name in shards.names if name.startswith(f"{part}.")]
            weights = {n.removeprefix(f"{part}."): shards.read(n, device, dtype) for n in names}
            assign_weights(self._model.get_submodule(part), weights, f"{part} of {directory}")

    def hear(self, samples: Samples) -> Tensor:
        """[N] -> [T, H]: what stands for the sound in the prompt, as when it is served."""
        return self.adapt(self.encode(samples))

    @torch.inference_mode()
    def encode(self, samples: Samples) -> Tensor:
        """[N] -> [T, D]: the frames of the encoder that are sound, none of the padding."""
        valid = self._mel.valid_frames(len(samples))
        encoder = self._model.audio_encoder_model
        frames = encoder.encode(log_mel(samples, self._mel), valid)
        return frames[: encoder.output_length(valid)]

    @torch.inference_mode()
    def adapt(self, frames: Tensor) -> Tensor:
        """[T, D] of an encoder -> [T', H] for the language model."""
        return self._model.adapt_audio([frames], [len(frames)], batch_rule=False)[0]


class SpokenPrompts:
    """Conversations -> what the LLM reads, from the system message to the end of the reply."""

    def __init__(
        self, directory: Path, source: LanguageFiles, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._directory, self._source = directory, source
        self._device, self._dtype = device, dtype
        self._prompt = PromptBuilder.from_directory(directory)
        self._tokens = TextTokens(directory)
        self._ears: Ears | None = None  # not loaded for texts alone

    def read(self, item: Item) -> tuple[Tensor, list[str]]:
        """[T, H], and of each position whether it is text, audio, or a control token: template."""
        if not isinstance(item, Conversation):
            return self._spliced(self._tokens.of_text(item.text), [])
        turns, reply = _question_and_reply(item)
        try:
            ids = self._prompt.build([_prompt_message(turn) for turn in turns])
        except RequestError as exc:
            raise ConfigError(f"{item.source}: {exc}") from exc
        audios = [self._heard(sound) for sound in item.sounds]
        return self._spliced([*ids, *self._tokens.of_piece(reply)], audios)

    def _heard(self, sound: Sound) -> Tensor:
        """[T, H] on the host, where the embeddings are."""
        self._ears = self._ears or Ears(self._directory, self._device, self._dtype)
        vectors = self._ears.hear(sound.samples())
        if not len(vectors):
            raise ConfigError(f"{sound.path} is too short to be heard; give 0.1 s or more")
        return vectors.to("cpu", torch.float32)

    def _spliced(self, ids: Sequence[int], audios: Sequence[Tensor]) -> tuple[Tensor, list[str]]:
        rows = self._source.embed(torch.tensor([max(i, 0) for i in ids]))  # [len(ids), H]
        waiting = iter(audios)
        pieces, kinds = [rows[:0]], []
        for i, row in zip(ids, rows, strict=True):
            piece = next(waiting) if i == AUDIO_SLOT else row[None]
            pieces.append(piece)
            kinds += [self._kind(i)] * len(piece)
        return torch.cat(pieces), kinds

    def _kind(self, token: int) -> str:
        if token == AUDIO_SLOT:
            return "audio"
        return "template" if token in self._tokens.control else "text"


def speech_calibration(
    opens2s_directory: Path,
    source: LanguageFiles,
    items: Iterable[Item],
    *,
    seq_len: int,
    max_tokens: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Calibration:
    """What the LLM hears and reads: sound spliced into the real prompt (spec: quantization 2.2).

    source: the LLM of the same directory. device, dtype: of the audio encoder, as it is served.
    Kinds: text, audio, and template for the control tokens. One audio is encoded at a time, and
    the encoder is gone when this returns. Raises ConfigError, with where it stands, for an item
    that cannot be heard or read.
    """
    prompts = SpokenPrompts(opens2s_directory, source, device, dtype)
    collector = Collector(seq_len=seq_len, max_tokens=max_tokens)
    sources = []
    for item in _while_room(items, collector):
        collector.add(*prompts.read(item))
        sources.append(_file_of(item))
    del prompts
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the room of the encoder, for the layers to come
    return collector.finish(sources)


def speech_lm_calibration(
    models: Models,
    items: Iterable[Item],
    *,
    seq_len: int,
    max_tokens: int,
    max_new_tokens: int = 256,
) -> Calibration:
    """What the speech LM reads while the models answer the questions of `items`.

    max_new_tokens: of the text of one reply, which is greedy; units are sampled as in the server,
    with a fixed seed. Kinds: speaker, state (of the LLM) and unit. Replies in the items are not
    used, plain texts neither. Raises ConfigError if there is no question.
    """
    config = EngineConfig(
        context_length=CONTEXT_LENGTH, kv_tokens=CONTEXT_LENGTH, reuse_prefixes=False
    )
    engine = Conversations(models, config, DecoderConfig())
    collector = Collector(seq_len=seq_len, max_tokens=max_tokens)
    sources = []
    for item in _while_room(items, collector):
        if isinstance(item, Conversation):
            try:
                collector.add(*_overheard_reply(engine, item, max_new_tokens))
            except PromptTooLong as exc:
                logger.info("left out: %s: %s", item.source, exc)
            else:
                sources.append(_file_of(item))
    if not sources:
        raise ConfigError(
            "no item is a conversation that fits the model; the speech model is calibrated on "
            "replies"
        )
    return collector.finish(sources)


def _while_room(items: Iterable[Item], collector: Collector) -> Iterator[Item]:
    for number, item in enumerate(items):
        if not collector.room:
            return
        if number and number % LOGGED == 0:
            logger.info("calibration: %d items, room for %d tokens", number, collector.room)
        yield item


def _overheard_reply(
    engine: Conversations, item: Conversation, max_new_tokens: int
) -> tuple[Tensor, list[str]]:
    """[T, D] that the speech LM read, and of each position: speaker, state or unit."""
    turns, _ = _question_and_reply(item)
    request = TurnRequest(
        messages=tuple(_message(turn) for turn in turns),
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        seed=0,
    )
    with _overheard(engine.models.lm.tts_lm_model) as calls:
        try:
            _answer(engine, request)
        except PromptTooLong:
            raise
        except RequestError as exc:
            raise ConfigError(f"{item.source}: {exc}") from exc
    kinds: list[str] = []
    for call in calls:  # what leads is its last unit, states follow
        kinds += ["unit" if kinds else "speaker", *["state"] * (len(call) - 1)]
    return torch.cat(calls), kinds


@contextmanager
def _overheard(lm: SpeechLM) -> Iterator[list[Tensor]]:
    """The vectors [T, D] of each call."""
    calls: list[Tensor] = []
    handle = lm.model.register_forward_pre_hook(
        lambda _, given: calls.append(given[0].to("cpu", torch.float32, copy=True))
    )
    try:
        yield calls
    finally:
        handle.remove()


def _answer(engine: Conversations, request: TurnRequest) -> None:
    """A whole reply, text and units, without making sound of it."""
    errors: list[Exception] = []

    def emit(event: Event | Exception) -> None:
        if isinstance(event, Exception):
            errors.append(event)

    session = engine.open(request, emit)
    if not engine.runner.enter(session):
        raise RequestError(f"the reply does not fit {CONTEXT_LENGTH} positions; shorten it")
    try:
        _read_prompt(engine, session)
        while not (session.interleaver.done or session.failed):
            if session.interleaver.needs_text:
                engine.runner.run_llm([LLMTurn(session)])
            else:
                engine.runner.run_speech([session])
    finally:
        engine.runner.leave(session)
    if errors:
        raise errors[0]


def _read_prompt(engine: Conversations, session: Session) -> None:
    while not session.heard:
        engine.runner.listen(session)
    engine.runner.run_llm([LLMTurn(session, session.prompt_left)])


def _question_and_reply(item: Conversation) -> tuple[Sequence[Turn], str]:
    """The turns before the last reply, and that reply; empty if the user speaks last."""
    if item.turns[-1].role != "assistant":
        return item.turns, ""
    reply = item.turns[-1].parts
    return item.turns[:-1], "".join(part for part in reply if isinstance(part, str))


def _prompt_message(turn: Turn) -> PromptMessage:
    parts = (part if isinstance(part, str) else AUDIO for part in turn.parts)
    return PromptMessage(turn.role, tuple(parts))


def _message(turn: Turn) -> Message:
    parts = (Text(part) if isinstance(part, str) else Audio(part.samples()) for part in turn.parts)
    return Message(turn.role, tuple(parts))


def _file_of(item: Item) -> str:
    return item.source.rpartition(":")[0]
