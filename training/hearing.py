"""Trains the audio encoder and its adapter: the words of a question, before any language model.

Two heads that are thrown away afterwards ask for them (CTC): the encoder for the sounds the words
are made of, which teaches it faster than whole words would, the adapter for the words.
"""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from omnispeech.audio.features import MelConfig, log_mel
from omnispeech.models.adapter import Adapter
from omnispeech.models.omnispeech import OmniSpeechConfig
from omnispeech.models.whisper import ENCODERS, EncoderConfig, WhisperEncoder
from training.batched import hear, stacked
from training.domain import every_word
from training.fitting import Figures, Plan, fit
from training.recordings import HEARD_HZ, Clip, Recordings
from training.voices import phones

BATCH = 24
CLEAN, SPOILED = 0.15, 0.6  # parts of the steps: from which on, and fully, clips are spoiled
LONGER = 0.2  # of these are silence and speech over two segments
WHOLE = 0.2  # of the batches are of whole segments
SEGMENT_S = 4
MEAN, DEVIATION = -0.4, 0.46  # of the features
MEL = MelConfig(feature_size=128, chunk_length=SEGMENT_S)
WORDS = {word: i for i, word in enumerate(dict.fromkeys(every_word()), 1)}  # 0: the blank of CTC


@cache
def sounds() -> tuple[dict[str, list[str]], dict[str, int]]:
    """What every word is made of, and a number for each sound."""
    made_of = {word: phones(word) for word in WORDS}
    names = sorted({sound for parts in made_of.values() for sound in parts})
    return made_of, {sound: i for i, sound in enumerate(names, 1)}


Known = TypeVar("Known")


class Heads(nn.Module):
    """Sounds at 50 Hz, words at 6.25 Hz; neither is part of the checkpoint."""

    def __init__(self, encoder_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(encoder_dim)
        self.sounds = nn.Linear(encoder_dim, len(sounds()[1]) + 1)
        self.words = nn.Linear(llm_dim, len(WORDS) + 1)

    def forward(self, clips: list[Clip], found: "Found") -> tuple[Tensor, Tensor]:
        """-> how badly sounds and words are told"""
        words = [clip.words.split() for clip in clips]
        made_of, number = sounds()
        spoken = [[number[sound] for w in row for sound in made_of[w]] for row in words]
        early = ctc(self.sounds(self.norm(found.fine)), found.fine_lengths, spoken)
        named = [[WORDS[w] for w in row] for row in words]
        return early, ctc(self.words(found.vectors), found.lengths, named)


class Ear(nn.Module):
    """Named as in the checkpoint, with the heads beside."""

    def __init__(self, config: OmniSpeechConfig) -> None:
        super().__init__()
        torch.manual_seed(13)
        encoder = config.audio_encoder
        assert isinstance(encoder, EncoderConfig)
        self.audio_encoder_model = ENCODERS[encoder.model_type](encoder)
        self.audio_adapter = Adapter(config.adapter)
        nn.init.normal_(self.audio_encoder_model.embed_positions.weight, std=0.02)
        standardise(self.audio_encoder_model)
        nn.init.constant_(self.audio_adapter.ln.weight, 0.3)
        self.heads = Heads(encoder.d_model, config.llm.hidden_size)

    def forward(self, mels: list[Tensor], frames: list[int], *, whole: bool = True) -> "Found":
        return listen(self.audio_encoder_model, self.audio_adapter, mels, frames, whole=whole)


@torch.no_grad()
def standardise(encoder: WhisperEncoder) -> None:
    """Starts the first convolution as if features had mean 0 and deviation 1: it learns
    far faster."""
    first = encoder.conv1
    first.weight /= DEVIATION
    assert first.bias is not None
    first.bias -= MEAN * first.weight.sum((1, 2))
    encoder.conv2.weight *= 2


@dataclass(frozen=True, slots=True)
class Found:
    """What is heard of clips that share a call, and how much of each tensor is of each clip."""

    fine: Tensor  # [B, T, D] before the pooling
    fine_lengths: list[int]
    vectors: Tensor  # [B, T', H] behind the adapter
    lengths: list[int]

    def of_clips(self) -> list[Tensor]:
        """[T', H] of each"""
        return [row[:n] for row, n in zip(self.vectors, self.lengths, strict=True)]


def listen(
    encoder: WhisperEncoder,
    adapter: Adapter,
    mels: list[Tensor],
    frames: list[int],
    *,
    whole: bool = True,
) -> Found:
    """mel [M, T] of each clip and its valid frames; segments of all share a call.

    whole: with all the silence that fills a segment, as the server has it.
    """
    size = encoder.segment_frames
    counts = [-(-n // size) for n in frames]
    pieces = [
        mel[:, : count * size].reshape(-1, count, size).transpose(0, 1)
        for mel, count in zip(mels, counts, strict=True)
    ]
    shown = size if whole else min(size, -(-max(frames) // 4) * 4)
    fine, pooled = hear(encoder, torch.cat(pieces)[:, :, :shown])  # [segments, T, D] each
    sharp = [clip.flatten(0, 1) for clip in torch.split(fine, counts)]
    joined = [clip.flatten(0, 1) for clip in torch.split(pooled, counts)]
    valid = [encoder.output_length(n) for n in frames]
    vectors, lengths = adapt(adapter, stacked(joined), valid)
    return Found(stacked(sharp), [len(clip) for clip in sharp], vectors, lengths)


def adapt(adapter: Adapter, heard: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
    """[B, T, D] of which `lengths` are valid -> [B, T', H] and what is valid of it.

    Clips share a call here; each is cut behind its end before every convolution, as if alone.
    """
    x = heard.transpose(1, 2)
    for conv in adapter.subsampler.conv_layers:
        inside = torch.arange(x.shape[2])[None] < torch.tensor(lengths)[:, None]
        x = F.glu(conv(x * inside[:, None]), dim=1)
        lengths = [(n - 1) // 2 + 1 for n in lengths]
    x = x.transpose(1, 2)
    return adapter.ln(x + adapter.fc2(F.gelu(adapter.fc1(x)))), lengths


def train_ear(
    config: OmniSpeechConfig, recordings: Recordings, steps: int, work: Path
) -> dict[str, Tensor]:
    model = Ear(config)
    plan = Plan(steps=steps, rate=2e-3, warm_up=200, average=0.998)
    known = [clip for dialogue in recordings.dialogues for _, clip in dialogue]
    known.sort(key=lambda clip: clip.length)

    def loss(rng: random.Random, done: float) -> tuple[Tensor, Figures]:
        some, whole = draw(known, BATCH, rng)
        strength = min(1.0, max(0.0, (done - CLEAN) / (SPOILED - CLEAN)))
        clips = [spoiled(recordings.read(c), rng, strength, longer=whole) for c in some]
        early, late = model.heads(some, model(*features(clips, rng, strength), whole=whole))
        return early + late, {"sounds": float(early.detach()), "words": float(late.detach())}

    return fit("ear", model, plan, loss, work)


def draw(known: list[Known], count: int, rng: random.Random) -> tuple[list[Known], bool]:
    """`known` is sorted by length. Some of all lengths, to be heard in whole segments, or of about
    one length without the rest of the segment, which costs half as much."""
    if rng.random() < WHOLE:
        return rng.choices(known, k=count), True
    window = len(known) // 8
    start = rng.randrange(len(known) - window + 1)
    return rng.choices(known[start : start + window], k=count), False


def ctc(logits: Tensor, lengths: list[int], words: list[list[int]]) -> Tensor:
    """[B, T, W]"""
    return F.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        torch.tensor([w for row in words for w in row]),
        torch.tensor(lengths),
        torch.tensor([len(row) for row in words]),
        zero_infinity=True,
    )


def spoiled(
    samples: NDArray[np.float32], rng: random.Random, strength: float, *, longer: bool = True
) -> NDArray[np.float32]:
    """Silence around it, another level, another room, noise: what a microphone adds.

    strength: from 0, nothing, to 1. longer: with so much silence at times that it takes two
    segments.
    """
    segments = 2 if longer and rng.random() < LONGER * strength else 1
    room = segments * SEGMENT_S * HEARD_HZ - len(samples)
    most = strength * HEARD_HZ * (0.8 if segments == 1 else 3.0)
    before = int(rng.random() ** 2 * min(room, most))
    after = int(rng.random() * min(room - before, 1.2 * most))
    x = np.pad(samples, (before, after))
    generator = np.random.default_rng(rng.getrandbits(60))
    if rng.random() < 0.25 * strength:
        x = echoing(x, generator)
    if rng.random() < 0.6 * strength:
        level = 10 ** (-rng.uniform(15, 50) / 20)
        noise = generator.normal(0, 1, len(x)).astype(np.float32)
        if rng.random() < 0.5:  # darker
            noise[1:] += 0.9 * noise[:-1]
        x = x + level * 0.15 * noise
    return (x * np.float32(10 ** (-strength * rng.uniform(0, 24) / 20))).astype(np.float32)


def echoing(x: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
    decay_s = generator.uniform(0.05, 0.25)
    length = int(0.3 * HEARD_HZ)
    fall = np.exp(-np.arange(length) / (decay_s * HEARD_HZ / 3))
    room = generator.normal(0, 1, length) * fall * 0.05
    room[0] = 1.0
    size = 1 << (len(x) + length).bit_length()
    wet = np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(room, size), size)[: len(x)]
    return (wet * (np.abs(x).max() / max(1e-6, np.abs(wet).max()))).astype(np.float32)


def features(
    clips: list[NDArray[np.float32]], rng: random.Random | None = None, strength: float = 0.0
) -> tuple[list[Tensor], list[int]]:
    """-> [M, T] of each clip and its valid frames; with a generator some is hidden and coloured."""
    mels = [log_mel(clip, MEL) for clip in clips]
    if rng is not None:
        for mel in mels:
            colour(mel, rng, strength)
    return mels, [MEL.valid_frames(len(clip)) for clip in clips]


def colour(mel: Tensor, rng: random.Random, strength: float) -> None:
    """[M, T] in place: a random tone control, then a band and a moment are hidden."""
    bins = len(mel)
    bend = torch.tensor([rng.gauss(0, 0.12 * strength) for _ in range(5)])
    mel += F.interpolate(bend[None, None], bins, mode="linear")[0, 0, :, None]
    low = mel.min()
    if rng.random() < 0.4 * strength:
        start, width = rng.randrange(bins), rng.randrange(1, 16)
        mel[start : start + width] = low
    if rng.random() < 0.4 * strength:
        start, width = rng.randrange(300), rng.randrange(1, 8)
        mel[:, start : start + width] = low
