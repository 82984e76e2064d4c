"""Answers in the blocks they are streamed in, held against one pass over all their units."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from golden_models import Caller, run
from small_models import heard, small_models, words

from omnispeech.config import DecoderConfig, EngineConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import AudioDelta, Done, Message, Text, TurnRequest
from omnispeech.engine.vocoder import open_stream
from training.spectrum import log_mel

RATE_HZ = 22_050
PITCH_PERIODS = 331  # samples, 15 ms: two or more of this voice, each with its own steepest edge
HOP = 64  # samples between two looks at the spectrum
BLUR = 512  # samples around a seam whose spectrum sees both sides of it
FRAME_OF_MEL = 256  # samples: whole frames are counted from the start of each block, rounded down
QUESTIONS = (
    "what is three plus four",
    "how much is nine minus six",
    "what is five times two",
    "repeat after me garden yellow monkey summer",
    "say apple tiger water",
    "where is the station",
    "what is twelve plus eight",
    "what is twenty minus thirteen",
    "how much is six times three",
    "say elephant window coffee morning",
)
SEED = 3


@dataclass(frozen=True)
class Answer:
    text: str
    pieces: list[np.ndarray]  # [N] int16 each, as they were streamed
    whole: np.ndarray  # [N] int16, of one pass

    @property
    def streamed(self) -> np.ndarray:
        return np.concatenate(self.pieces)

    @property
    def seams(self) -> list[int]:
        """The first sample of each piece but the first"""
        return np.cumsum([len(piece) for piece in self.pieces])[:-1].tolist()


def answers() -> Iterator[Answer]:
    models = small_models()
    engine = Conversations(models, EngineConfig(), DecoderConfig())
    for question in QUESTIONS:
        messages = (Message("user", (Text(question),)),)
        caller = Caller(engine, TurnRequest(messages=messages, seed=SEED))
        run(engine)
        done = caller.events[-1]
        assert isinstance(done, Done) and done.speech_finish == "stop", question
        pieces = [
            np.frombuffer(event.pcm, "<i2")
            for event in caller.events
            if isinstance(event, AudioDelta)
        ]
        units = [unit - models.language.units.units_bias for unit in caller.ids[1]]
        known = [unit for unit in units if 0 <= unit < models.language.units.count]
        whole = open_stream(models.decoder, DecoderConfig(), SEED).push(known, final=True)
        yield Answer(caller.text, pieces, (whole.numpy() * 32767).astype("<i2"))


@pytest.fixture(scope="module")
def ten() -> list[Answer]:
    return list(answers())


def test_blocks_hold_as_many_samples_as_one_pass(ten: list[Answer]) -> None:
    assert [len(answer.streamed) for answer in ten] == [len(answer.whole) for answer in ten]
    assert all(answer.seams for answer in ten)


def test_the_same_words_are_heard_from_blocks_as_from_one_pass(ten: list[Answer]) -> None:
    for answer in ten:
        assert heard(answer.streamed, RATE_HZ) == words(answer.text)
        assert heard(answer.whole, RATE_HZ) == words(answer.text)


def step(samples: np.ndarray, seam: int) -> float:
    """From the last sample before a seam to the first behind it, over the largest step near it."""
    steps = np.abs(np.diff(samples.astype(np.int32)))
    at = seam - 1
    near = np.concatenate(
        [steps[max(0, at - PITCH_PERIODS) : at], steps[at + 1 : at + 1 + PITCH_PERIODS]]
    )
    return steps[at] / max(1, near.max())


def test_no_seam_is_a_larger_step_than_the_sound_around_it_makes(ten: list[Answer]) -> None:
    assert max(step(answer.streamed, seam) for answer in ten for seam in answer.seams) < 1


def unlike(streamed: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """[T]: how far each spectrum of the stream is from the most similar one of the one pass that
    is not further away than rounded frames can be; mean of natural logarithms."""
    mels = [
        log_mel(torch.from_numpy(x / np.float32(32768))[None], RATE_HZ, hop=HOP)[0]
        for x in (streamed, whole)
    ]
    reach = FRAME_OF_MEL * 3 // 2 // HOP
    others = torch.nn.functional.pad(mels[1][None], (reach, reach), mode="replicate")[0]
    shifted = others.unfold(1, mels[0].shape[1], 1)  # [M, shifts, T]
    return (shifted - mels[0][:, None]).abs().mean(0).min(0).values.numpy()


def test_spectra_at_seams_are_as_near_to_one_pass_as_any_others(ten: list[Answer]) -> None:
    at_seams, elsewhere = [], []
    for answer in ten:
        distance = unlike(answer.streamed, answer.whole)
        times = HOP * np.arange(len(distance))
        near = np.any([np.abs(times - seam) <= BLUR for seam in answer.seams], axis=0)
        at_seams.append(distance[near].max())
        elsewhere.append(distance[~near].max())
    assert max(at_seams) < max(elsewhere)
    assert np.mean(at_seams) < np.mean(elsewhere)
