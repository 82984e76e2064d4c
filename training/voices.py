"""The synthesizers that say what this model is trained on: espeak-ng, and flite for voices made of
what people said."""

import io
import re
import subprocess
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from omnispeech.errors import OmniSpeechError

RATE_HZ = 22_050
FLITE = "flite:"
FLITE_PITCH_HZ = {"slt": 175, "rms": 95, "awb": 125, "kal16": 105, "kal": 105}


@dataclass(frozen=True, slots=True)
class Voice:
    name: str  # language and variant of espeak-ng, as in en-us+klatt, or flite:NAME
    words_per_minute: int = 160
    pitch: int = 50  # 0 to 99


def speak(text: str, voice: Voice) -> NDArray[np.float32]:
    """-> [N] at RATE_HZ, in [-1, 1]"""
    command = _flite if voice.name.startswith(FLITE) else _espeak
    sound = _output(command(text, voice), voice)
    samples, rate_hz = soundfile.read(io.BytesIO(sound), dtype="float32")
    return soxr.resample(samples, rate_hz, RATE_HZ) if rate_hz != RATE_HZ else samples


def _espeak(text: str, voice: Voice) -> list[str]:
    said = ["-s", str(voice.words_per_minute), "-p", str(voice.pitch)]
    return ["espeak-ng", "-v", voice.name, *said, "-z", "--stdout", text]


def _flite(text: str, voice: Voice) -> list[str]:
    name = voice.name.removeprefix(FLITE)
    pitch_hz = FLITE_PITCH_HZ[name] * 2 ** ((voice.pitch - 50) / 75)
    said = [
        f"int_f0_target_mean={pitch_hz:.1f}",
        f"duration_stretch={165 / voice.words_per_minute}",
    ]
    flags = [flag for setting in said for flag in ("--setf", setting)]
    return ["flite", "-voice", name, *flags, "-t", text, "-o", "/dev/stdout"]


def _output(command: list[str], voice: Voice) -> bytes:
    done = _run(command)
    if done.returncode or len(done.stdout) <= 44:
        told = done.stderr.decode(errors="replace").strip()
        raise OmniSpeechError(f"{command[0]} failed for {voice.name}: {told}")
    return done.stdout


def _run(command: list[str]) -> "subprocess.CompletedProcess[bytes]":
    try:
        return subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError as exc:
        raise OmniSpeechError(
            f"{command[0]} is not installed. Run: apt-get install espeak-ng flite"
        ) from exc


def phones(word: str) -> list[str]:
    """What a word is made of, as American English says it, stress left out."""
    command = ["espeak-ng", "-q", "--ipa", "--sep=_", "-v", "en-us", word]
    plain = _run(command).stdout.decode().strip().translate(str.maketrans("", "", "ˈˌː"))
    return [phone for phone in re.split(r"[_ ]+", plain) if phone]
