"""How well the decoder speaks, each part behind the one before, and how quiet its pauses are."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from omnispeech.config import DecoderConfig
from omnispeech.engine.vocoder import open_stream
from omnispeech.models.speech_decoder import SpeechDecoder
from training.answers import Lexicon, make_sentence
from training.vocoder import speak

Samples = NDArray[np.float32]
Way = Callable[[list[str]], Samples]
WINDOW = 220  # samples: 10 ms, the grain of a pause
SILENT = 1e-4  # of the recording: below it is a pause
MARGIN = 3  # windows of a pause at each of its ends that still may ring
FIRST_BLOCK, BLOCK = 10, 20  # units


@dataclass(frozen=True, slots=True)
class Chain:
    """Ways from the words of an answer to sound: [N] at RATE_HZ."""

    lexicon: Lexicon
    decoder: SpeechDecoder

    @torch.inference_mode()
    def vocoder(self, words: list[str]) -> Samples:
        torch.manual_seed(1)
        mel = make_sentence(self.lexicon, words).mel[None]
        f0 = self.decoder.hift.f0_predictor(mel)
        return speak(self.decoder.hift, mel, f0)[0].numpy()

    def flow(self, words: list[str]) -> Samples:
        units = self.lexicon.spoken_units(words)
        return open_stream(self.decoder, DecoderConfig(), 1).push(units, True).numpy()

    def blocks(self, words: list[str]) -> Samples:
        units = self.lexicon.spoken_units(words)
        stream = open_stream(self.decoder, DecoderConfig(), 1)
        ends = [*range(FIRST_BLOCK, len(units), BLOCK), len(units)]
        starts = [0, *ends[:-1]]
        pieces = [
            stream.push(units[a:b], b == len(units)).numpy()
            for a, b in zip(starts, ends, strict=True)
        ]
        return np.concatenate(pieces)

    def ways(self) -> dict[str, Way]:
        return {
            "recordings of the answers": self.lexicon.speech,
            "vocoder from their mel": self.vocoder,
            "flow from their units": self.flow,
            "the same in blocks": self.blocks,
        }


def pause_level_db(made: Samples, recording: Samples) -> float | None:
    """Level of `made` where the recording is silent, against its level elsewhere; both start
    together. None if the recording has no pause."""
    length = min(len(made), len(recording)) // WINDOW
    loud = np.abs(recording[: length * WINDOW]).reshape(length, WINDOW).max(1) > SILENT
    near = np.convolve(loud, np.ones(2 * MARGIN + 1), "same") > 0
    power = np.square(made[: length * WINDOW]).reshape(length, WINDOW).mean(1)
    if near.all():
        return None
    return float(10 * np.log10((power[~near].mean() + 1e-12) / power[loud].mean()))
