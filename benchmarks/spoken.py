"""Spoken questions put to a model, its answers in text and units, and what a recogniser hears."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from omnispeech.audio.io import encode_wav, pcm16_from_samples
from omnispeech.config import DecoderConfig
from omnispeech.engine.conversations import Conversations
from omnispeech.engine.events import Audio, Event, Message, Samples, TurnRequest
from omnispeech.engine.scheduler import LLMTurn
from omnispeech.engine.session import Session
from omnispeech.engine.vocoder import open_stream
from omnispeech.models.speech_decoder import SpeechDecoder
from training.domain import Turn
from training.judge import Judge
from training.recordings import HEARD_HZ, JUDGED, VARIANTS, Clip, Recordings, Voices, record

SILENCE_S = 0.2  # around a question
AT_ONCE = 32  # replies that share model calls
LONGEST = 64  # text tokens of an answer
SOUND_SEED = 1
CALIBRATING = Voices(VARIANTS)  # none of those that ask the questions of the figures


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    sound: Samples  # [N] at HEARD_HZ
    wanted: str


def held_out(work: Path, count: int, snr_db: float | None = None) -> list[Question]:
    """First turns of dialogues, in voices that are in no training set; with white noise if asked
    for."""
    recordings = record(work, f"judged-{count}", count, JUDGED)
    asked = [dialogue[0] for dialogue in recordings.dialogues]
    sounds = [_padded(recordings.read(clip)) for _, clip in asked]
    if snr_db is not None:
        sounds = [in_noise(sound, snr_db, seed) for seed, sound in enumerate(sounds)]
    return [Question(sound, turn.answer) for sound, (turn, _) in zip(sounds, asked, strict=True)]


def in_noise(sound: Samples, snr_db: float, seed: int) -> Samples:
    """White noise so far below the mean power of the sound."""
    level = np.sqrt(np.mean(np.square(sound))) * 10 ** (-snr_db / 20)
    noise = np.random.default_rng(seed).normal(0, level, len(sound))
    return np.clip(sound + noise, -1, 1).astype(np.float32)


def _padded(samples: Samples) -> Samples:
    return np.pad(samples, int(SILENCE_S * HEARD_HZ))


def calibration(work: Path, count: int) -> Path:
    """A directory for --calib: dialogues of the domain, in voices of the training set."""
    directory = work / f"calibration-{count}"
    listing = directory / "conversations.jsonl"
    if not listing.is_file():
        directory.mkdir(exist_ok=True)
        recordings = record(work, f"calibrating-{count}", count, CALIBRATING)
        lines = [json.dumps({"messages": messages}) for messages in _spoken(recordings, directory)]
        listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def _spoken(recordings: Recordings, directory: Path) -> Iterator[list[dict[str, Any]]]:
    for number, dialogue in enumerate(recordings.dialogues):
        messages: list[dict[str, Any]] = []
        for place, (turn, clip) in enumerate(dialogue):
            file = directory / f"{number}-{place}.wav"
            pcm = pcm16_from_samples(_padded(recordings.read(clip)))
            file.write_bytes(encode_wav(pcm, HEARD_HZ))
            messages += _messages(turn, clip, file.name)
        yield messages


def _messages(turn: Turn, clip: Clip, file: str) -> list[dict[str, Any]]:
    sound = {"type": "audio", "path": file, "transcript": clip.words}
    return [
        {"role": "user", "content": [sound]},
        {"role": "assistant", "content": turn.answer},
    ]


def requests(asked: Sequence[Question], *, greedy: bool) -> list[TurnRequest]:
    """With the server's default sampling, and the number of the question for a seed."""
    sampled = [
        TurnRequest(
            messages=(Message("user", (Audio(question.sound),)),),
            max_new_tokens=LONGEST,
            seed=number,
        )
        for number, question in enumerate(asked)
    ]
    if not greedy:
        return sampled
    return [replace(request, temperature=0.0, speech_temperature=0.0) for request in sampled]


def answer(engine: Conversations, asked: Sequence[TurnRequest]) -> list[Session]:
    """Whole replies in text and units, of which no sound is made."""
    groups = (asked[i : i + AT_ONCE] for i in range(0, len(asked), AT_ONCE))
    return [session for group in groups for session in _together(engine, group)]


def _together(engine: Conversations, asked: Sequence[TurnRequest]) -> list[Session]:
    sessions = [engine.open(request, _raise) for request in asked]
    runner = engine.runner
    for session in sessions:
        assert runner.enter(session), "there is room for AT_ONCE replies"
        while not session.heard:
            runner.listen(session)
        runner.run_llm([LLMTurn(session, session.prompt_left)])
    while going := [s for s in sessions if not s.interleaver.done]:
        if writing := [LLMTurn(s) for s in going if s.interleaver.needs_text]:
            runner.run_llm(writing)
        runner.run_speech([s for s in going if s.interleaver.wants_speech])
    for session in sessions:
        runner.leave(session)
    return sessions


def _raise(event: Event | Exception) -> None:
    if isinstance(event, Exception):
        raise event


@dataclass(slots=True)
class Listener:
    """What the judge hears of units; the same units sound the same, so they are heard once."""

    decoder: SpeechDecoder
    judge: Judge = field(default_factory=Judge)
    known: dict[tuple[int, ...], list[str]] = field(default_factory=dict)

    def hear(self, units: Sequence[int]) -> list[str]:
        key = tuple(units)
        if key not in self.known:
            self.known[key] = self._heard(key) if key else []
        return self.known[key]

    def _heard(self, units: tuple[int, ...]) -> list[str]:
        stream = open_stream(self.decoder, DecoderConfig(), SOUND_SEED)
        samples = stream.push(units, True).numpy()
        return self.judge.hear(samples, self.decoder.sample_rate_hz)
