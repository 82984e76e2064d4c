"""The calibration of a run: what the user named, else what ships with the project."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from omnispeech.assembly import choose_dtype, load_sources
from omnispeech.calibration.datasets import dataset_items
from omnispeech.calibration.items import Conversation, Item, read_items, shipped_items
from omnispeech.calibration.samples import Calibration, text_calibration
from omnispeech.calibration.tokens import TextTokens
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.models_directory import choose_sources
from omnispeech.checkpoint.sizes import encoder_size, models_size
from omnispeech.checkpoint.weight_plan import Target
from omnispeech.errors import ConfigError
from omnispeech.quantize_cli.choices import Calibrate
from omnispeech.quantize_cli.room import require_room
from omnispeech.speech_calibration import speech_calibration, speech_lm_calibration


def items_of(choice: Calibrate) -> list[Item]:
    """Raises ConfigError for what cannot be read, and for data sets that are not found."""
    items = [item for path in (*choice.paths, *choice.texts) for item in read_items(path)]
    if choice.mixture:
        items += dataset_items(choice.mixture, splits=choice.splits)
    return (items or shipped_items())[: choice.max_samples]


@dataclass(frozen=True, slots=True)
class Calibrator:
    """How a calibration comes about, on a device that is chosen later."""

    check: Callable[[torch.device], None]  # raises ConfigError if what it loads does not fit
    listen: Callable[[torch.device], Calibration]


def of_text_model(source: LanguageFiles, choice: Calibrate) -> Calibrator:
    """As a text model reads it; of sound, the transcript. Embeddings alone are read for it."""

    def listen(_: torch.device) -> Calibration:
        return text_calibration(
            source, items_of(choice), seq_len=choice.seq_len, max_tokens=choice.max_tokens
        )

    return Calibrator(lambda _: None, listen)


def of_llm(source: LanguageFiles, choice: Calibrate) -> Calibrator:
    """As the LLM of an OpenS2S directory reads it: with sound, unless text alone was asked for."""
    if choice.texts:
        return of_text_model(source, choice)

    def check(device: torch.device) -> None:
        size = encoder_size(source.directory, Target(device, choose_dtype("auto", device)))
        require_room("the audio encoder and its adapter", size, device)

    def listen(device: torch.device) -> Calibration:
        return speech_calibration(
            source.directory,
            source,
            items_of(choice),
            seq_len=choice.seq_len,
            max_tokens=choice.max_tokens,
            device=device,
            dtype=choose_dtype("auto", device),
        )

    return Calibrator(check, listen)


def of_speech_lm(models: Path, choice: Calibrate) -> Calibrator:
    """What the speech LM reads while the models answer; they are all loaded for that."""
    if choice.texts:
        raise ConfigError("the speech LM reads no text; calibrate it with --calib, or the default")
    sources = choose_sources(models)

    def check(device: torch.device) -> None:
        size = models_size(sources, Target(device, choose_dtype("auto", device)))
        require_room("all models of a conversation", size, device)

    def listen(device: torch.device) -> Calibration:
        items = items_of(choice)  # what cannot be read is told before the models are loaded
        return speech_lm_calibration(
            load_sources(sources, device, choose_dtype("auto", device)),
            items,
            seq_len=choice.seq_len,
            max_tokens=choice.max_tokens,
        )

    return Calibrator(check, listen)


def token_samples(source: LanguageFiles, choice: Calibrate) -> list[list[int]]:
    """Token ids, none longer than `seq_len`, for an engine that reads nothing else."""
    tokens = TextTokens(source.directory)
    read = (_ids(tokens, item) for item in items_of(choice))
    ids = [
        text[i : i + choice.seq_len] for text in read for i in range(0, len(text), choice.seq_len)
    ]
    samples = list(_up_to(ids, choice.max_tokens))
    if not samples:
        raise ConfigError("the calibration data has no tokens; give texts that are not empty")
    return samples


def _ids(tokens: TextTokens, item: Item) -> list[int]:
    if isinstance(item, Conversation):
        return tokens.of_conversation(item)
    return tokens.of_text(item.text)


def _up_to(samples: Iterable[list[int]], room: int) -> Iterable[list[int]]:
    for sample in samples:
        taken = list(islice(sample, room))
        if not taken:
            return
        room -= len(taken)
        yield taken
