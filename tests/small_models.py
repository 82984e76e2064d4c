"""The small model, which hears and answers: questions for it, and the judge of what it says."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from golden_models import ready
from numpy.typing import NDArray

from omnispeech.assembly import language_models
from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.checkpoint.models_directory import DECODER, OPENS2S
from omnispeech.checkpoint.opens2s import load_opens2s
from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.events import Audio, Message, Samples
from omnispeech.engine.runner import Models
from omnispeech.engine.worker import Worker
from omnispeech.small.directory import PLACE
from training.domain import words_of
from training.judge import Judge

RECORDED = Path(__file__).parent / "golden" / "small"  # its README says who asks what
ANSWERS = {
    "sum": "Three plus four is seven.",
    "difference": "Nine minus six is three.",
    "product": "Five times two is ten.",
    "repetition": "Apple tiger.",
    "long": "Garden yellow monkey summer.",
    "unknown": "I do not know.",
}
MORE = "Seven plus two is nine."  # the answer to "more" behind "sum"


@cache
def small_models() -> Models:
    """As they are shipped; nothing is written beside them."""
    loaded = load_opens2s(PLACE / OPENS2S, torch.device("cpu"), torch.float32)
    language = language_models(PLACE / OPENS2S, loaded)
    return Models(language, load_decoder(PLACE / DECODER, convert=False))


@contextmanager
def small_worker(*, first_block: int = 0, **settings: int) -> Iterator[Worker]:
    """Ready; `settings` of the engine. first_block: as in DecoderConfig.

    A reply whose caller names no seed has always the same: what is said is no matter of chance.
    """
    sound = DecoderConfig(first_block=first_block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("omnispeech.engine.conversations.random", Same())
        with ready(Worker(small_models, EngineConfig(**settings), sound)) as worker:
            yield worker


class Same:
    """In place of the module `random`."""

    def getrandbits(self, bits: int) -> int:
        return 1


def recorded(name: str) -> bytes:
    """The file of a question."""
    return (RECORDED / f"{name}.flac").read_bytes()


def spoken(name: str) -> Samples:
    """[N] at 16 kHz"""
    samples, _ = soundfile.read(RECORDED / f"{name}.flac", dtype="float32")
    return samples


def asking(name: str) -> Message:
    return Message("user", (Audio(spoken(name)),))


@cache
def judge() -> Judge:
    return Judge()


def heard(samples: NDArray[np.int16], rate_hz: int) -> list[str]:
    """The words, as somebody else understands them."""
    return judge().hear(samples / np.float32(32768), rate_hz)


def words(text: str) -> list[str]:
    """Of an answer, as they are heard."""
    return words_of(text)


def pcm(pieces: Sequence[bytes]) -> NDArray[np.int16]:
    return np.frombuffer(b"".join(pieces), "<i2")
