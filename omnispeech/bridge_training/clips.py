"""The user's audio: which files there are, which of them are held out, and their clips."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from omnispeech.audio.io import SAMPLE_RATE_HZ, audio_blocks
from omnispeech.audio.resample import Samples
from omnispeech.calibration.items import SHIPPED
from omnispeech.errors import AudioError, ConfigError

CLIP = 30 * SAMPLE_RATE_HZ  # samples at most: a segment of the audio encoder
SHORTEST = SAMPLE_RATE_HZ // 10  # samples: what is left of a file and shorter is not heard
FEWEST_FILES = 3  # to fit with, to choose the ridge with, to hold out
HASHED = 1 << 24  # bytes at a time
MORE_SUFFIXES = {".mp3", ".ogg", ".oga", ".opus", ".aif", ".aifc", ".wave"}


@dataclass(frozen=True, slots=True)
class AudioFile:
    path: Path
    name: str  # below the directory of the data, with forward slashes
    seconds: float  # as its header says
    sha256: str

    def clips(self) -> Iterator[Samples]:
        """[N] float32, mono, 16 kHz, of 30 s at most; raises ConfigError where it is damaged."""
        waiting: list[Samples] = []
        try:
            for block in audio_blocks(self.path):
                waiting.append(block)
                if sum(map(len, waiting)) >= CLIP:
                    *full, rest = _cut(np.concatenate(waiting))
                    yield from full
                    waiting = [rest]
        except (AudioError, OSError) as exc:
            raise ConfigError(f"{self.path}: {exc}, or take it out of the data") from exc
        if len(last := np.concatenate([*waiting, np.zeros(0, np.float32)])) >= SHORTEST:
            yield last


def _cut(samples: Samples) -> list[Samples]:
    """Full clips, and what is left, which may be nothing."""
    full = len(samples) // CLIP
    return [*samples[: full * CLIP].reshape(full, CLIP), samples[full * CLIP :]]


@dataclass(frozen=True, slots=True)
class Split:
    """Files of three kinds; no recording is in two of them."""

    training: tuple[AudioFile, ...]
    validation: tuple[AudioFile, ...]  # chooses the ridge, and is then fitted to as well
    held_out: tuple[AudioFile, ...]  # heard once, when everything is decided

    @property
    def fitted(self) -> tuple[AudioFile, ...]:
        return self.training + self.validation

    @property
    def digest(self) -> str:
        """Of which recordings are of which kind, and of their order."""
        kinds = (self.training, self.validation, self.held_out)
        text = "\n".join(" ".join(file.sha256 for file in kind) for kind in kinds)
        return hashlib.sha256(text.encode()).hexdigest()


def find_audio(directory: Path | None) -> list[AudioFile]:
    """Every sound file below `directory`, sorted by name; None: what ships with the project.

    Headers are read and all bytes hashed, nothing is decoded. Raises ConfigError if there is
    none, and with the names of those that cannot be read.
    """
    root = SHIPPED / "sound" if directory is None else directory
    if not root.is_dir():
        raise ConfigError(f"{root} is not a directory; --data takes one that holds sound files")
    known = {f".{name.lower()}" for name in soundfile.available_formats() if name != "RAW"}
    paths = sorted(p for p in root.rglob("*") if _is_audio(p, known | MORE_SUFFIXES))
    if not paths:
        raise ConfigError(
            f"{root} holds no audio; allowed: WAV, FLAC, OGG, MP3 and all else that libsndfile "
            "reads, in folders of any depth"
        )
    unreadable = [path for path in paths if _seconds(path) is None]
    if unreadable:
        raise ConfigError(
            f"{len(unreadable)} of {len(paths)} files cannot be read as audio: "
            f"{', '.join(map(str, unreadable[:3]))}{' ...' if len(unreadable) > 3 else ''}; "
            "mend them, or take them out of the data"
        )
    return [_audio_file(path, root) for path in paths]


def _is_audio(path: Path, suffixes: set[str]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()


def _audio_file(path: Path, root: Path) -> AudioFile:
    return AudioFile(path, path.relative_to(root).as_posix(), _seconds(path) or 0.0, _sha256(path))


def _seconds(path: Path) -> float | None:
    try:
        return float(soundfile.info(str(path)).duration)
    except soundfile.SoundFileError:
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASHED):
            digest.update(piece)
    return digest.hexdigest()


def split(files: Sequence[AudioFile], hold_out: float, seed: int) -> Split:
    """By file: frames of one recording are too much alike to test each other.

    hold_out: share of the files that is held out; the same share of the rest chooses the ridge.
    Equal files count as one. Raises ConfigError for fewer than three different ones.
    """
    unlike = list({file.sha256: file for file in reversed(files)}.values())
    if len(unlike) < FEWEST_FILES:
        raise ConfigError(
            f"{len(unlike)} different audio files; {FEWEST_FILES} or more are needed, as whole "
            "files are held out: cut a long recording into several, by speaker or by day"
        )
    if not 0 < hold_out < 1:
        raise ConfigError(f"--hold-out {hold_out:g}; allowed: more than 0 and less than 1")
    drawn = sorted(unlike, key=lambda file: _draw(file, seed))
    held = min(_share(len(drawn), hold_out), len(drawn) - 2)
    rest = drawn[held:]
    validating = min(_share(len(rest), hold_out), len(rest) - 1)
    return Split(tuple(rest[validating:]), tuple(rest[:validating]), tuple(drawn[:held]))


def _share(count: int, share: float) -> int:
    return max(1, math.floor(count * share))


def _draw(file: AudioFile, seed: int) -> bytes:
    """By content: a file that is added or renamed moves no other to another side."""
    return hashlib.sha256(f"{seed} {file.sha256}".encode()).digest()
