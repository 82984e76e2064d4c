"""bench.py turns: when the end of speech is found, and what listening costs.

    python bench.py turns

Speech whose begin and end are known comes in as a client sends it, 20 ms at a time, in each format
and in noise. All times are of the sound: what the server and the way add is not in them.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from benchmarks.hardware import hardware
from omnispeech.audio.formats import PCM_24K, PCMU, AudioFormat
from omnispeech.audio.resample import Samples
from omnispeech.audio.vad import SpeechDetector
from omnispeech.server.realtime.hearing.input_audio import InputAudio
from omnispeech.server.realtime.hearing.turn_detection import (
    Paused,
    SpeechStarted,
    SpeechStopped,
    TurnDetector,
    TurnEvent,
)
from omnispeech.server.realtime.settings.turn_settings import ServerVAD

ROOT = Path(__file__).parent.parent
CLIPS = ("tests/golden/speech/yes.flac", "tests/golden/speech/german.flac", "examples/question.wav")
QUESTION_ENDS = 24_330  # the sample; silence follows
PER_MS = 16
PIECE_S = 0.02
AFTER_MS = 1200
LONGEST_S = 60.0
TOLD = {SpeechStarted: "begin told", Paused: "pause told", SpeechStopped: "end told"}


@dataclass(slots=True)
class Delays:
    """ms after the begin (SpeechStarted) or the end of the speech, one for each clip"""

    of: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in TOLD.values()})
    cpu_s: float = 0.0
    sound_s: float = 0.0

    def row(self) -> str:
        shown = [
            f"{statistics.median(ms):.0f} ({min(ms):.0f} to {max(ms):.0f})"
            for ms in self.of.values()
        ]
        return " | ".join([*shown, f"{1000 * self.cpu_s / self.sound_s:.1f}"])


def clips() -> Iterator[Samples]:
    for name in CLIPS:
        yield soundfile.read(ROOT / name, dtype="float32")[0][:QUESTION_ENDS]


def told(sound: bytes, format: AudioFormat, delays: Delays) -> Iterator[tuple[float, TurnEvent]]:
    """(ms of sound that the client had sent, what it was told then)"""
    audio = InputAudio(format, LONGEST_S)
    detector = TurnDetector(ServerVAD(), 200, SpeechDetector())
    sent_bytes = 0
    for piece in format.pieces(sound, PIECE_S):
        began = time.process_time()
        sent_bytes += len(piece)
        events = detector.push(audio.append(piece))
        audio.forget(detector.needed_from_ms)
        delays.cpu_s += time.process_time() - began
        yield from ((format.milliseconds(sent_bytes), event) for event in events)
    delays.sound_s += format.milliseconds(sent_bytes) / 1000


def measure(format: AudioFormat, noise: float, begins_ms: range) -> Delays:
    delays, random = Delays(), np.random.default_rng(0)
    for clip in clips():
        for begin_ms in begins_ms:
            sound = np.pad(clip, (begin_ms * PER_MS, AFTER_MS * PER_MS))
            sound += noise * random.standard_normal(len(sound)).astype(np.float32)
            end_ms = begin_ms + len(clip) / PER_MS
            data = format.encode(soxr.resample(sound, PER_MS * 1000, format.rate))
            for sent_ms, event in told(data, format, delays):
                if name := TOLD.get(type(event)):
                    since = begin_ms if name == "begin told" else end_ms
                    delays.of[name].append(sent_ms - since)
    return delays


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench.py turns", description="Measures turn detection.")
    parser.add_argument("--begins", type=int, default=12, help="of each clip against the windows")
    begins_ms = range(600, 600 + 7 * parser.parse_args(arguments).begins, 7)
    columns = ("format", "noise", *TOLD.values(), "CPU (ms per s of sound)")
    lines = [
        f"{hardware(torch.device('cpu'))}; ms after the truth, median and range; speech of peaks "
        "0.5 to 0.7, silence_duration_ms 500, speculate_ms 200.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for format in (PCM_24K, PCMU):
        for noise in (0.0, 0.003, 0.01):
            row = measure(format, noise, begins_ms).row()
            lines.append(f"| {format.type} | {noise:g} | {row} |")
    sys.stdout.write("\n".join(lines) + "\n")
