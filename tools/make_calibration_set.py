"""Makes the sound of the calibration set from the transcripts in its conversations.jsonl.

    python tools/make_calibration_set.py

needs espeak-ng. Voice, speed, pitch, level and noise of a clip follow from its file name, so that
the same texts give the same files.
"""

import argparse
import io
import json
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from omnispeech.audio.io import SAMPLE_RATE_HZ, decode_audio
from omnispeech.audio.resample import Samples
from omnispeech.calibration.items import SHIPPED

VOICES = {  # by the start of the file name
    "en": ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-us-nyc"),
    "zh": ("cmn",),
    "de": ("de",),
    "fr": ("fr-fr", "fr-be"),
    "es": ("es", "es-419"),
}
VARIANTS = ("", "+m1", "+m3", "+m4", "+m7", "+f1", "+f2", "+f3", "+f4", "+f5")
SPEEDS_WPM = (130, 210)
PITCHES = (25, 75)
LEVELS_DB = (-34.0, -16.0)  # of the mean square, below full scale
NOISES_DB = (-50.0, -18.0)  # below the voice
COMPRESSION = 0.94  # of Opus, 0 to 1: about 20 kbit/s
SERIAL = 1  # libsndfile draws one at random


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=SHIPPED)
    directory = parser.parse_args().directory
    (directory / "sound").mkdir(exist_ok=True)
    for name, transcript in transcripts(directory / "conversations.jsonl"):
        path = directory / name
        path.write_bytes(encode(spoken(path.stem, transcript)))
    return 0


def transcripts(file: Path) -> Iterator[tuple[str, str]]:
    """(path, what is said) of every clip."""
    for line in file.read_text(encoding="utf-8").splitlines():
        for message in json.loads(line).get("messages", ()):
            if isinstance(message["content"], list):
                parts = (part for part in message["content"] if part["type"] == "audio")
                yield from ((part["path"], part["transcript"]) for part in parts)


def spoken(name: str, text: str) -> Samples:
    """[N] at 16 kHz"""
    chance = np.random.default_rng(zlib.crc32(name.encode()))
    voice = chance.choice(VOICES[name[:2]]) + chance.choice(VARIANTS)
    speed, pitch = (int(chance.integers(*span)) for span in (SPEEDS_WPM, PITCHES))
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", "--stdin"]
    wav = subprocess.run(command, input=text.encode(), stdout=subprocess.PIPE, check=True).stdout
    voice_samples = decode_audio(wav, max_seconds=60.0)
    loud = 10 ** (chance.uniform(*LEVELS_DB) / 20) / np.sqrt(np.mean(voice_samples**2))
    hiss = 10 ** (chance.uniform(*NOISES_DB) / 20) * np.sqrt(np.mean(voice_samples**2))
    noise = chance.normal(size=len(voice_samples)) * hiss
    return np.clip((voice_samples + noise) * loud, -1, 1).astype(np.float32)


def encode(samples: Samples) -> bytes:
    """[N] at 16 kHz -> Ogg Opus"""
    file = io.BytesIO()
    soundfile.write(
        file,
        samples,
        SAMPLE_RATE_HZ,
        format="OGG",
        subtype="OPUS",
        compression_level=COMPRESSION,
    )
    return with_serial(file.getvalue())


def with_serial(ogg: bytes) -> bytes:
    """The same Ogg pages with SERIAL as the number of their stream, and new checksums."""
    pages, start = [], 0
    while start < len(ogg):
        segments = ogg[start + 26]
        body = start + 27 + segments
        stop = body + sum(ogg[start + 27 : body])
        page = bytearray(ogg[start:stop])
        page[14:18] = SERIAL.to_bytes(4, "little")
        page[22:26] = bytes(4)
        page[22:26] = checksum(page).to_bytes(4, "little")
        pages.append(bytes(page))
        start = stop
    return b"".join(pages)


def checksum(page: bytes | bytearray) -> int:
    """CRC-32 as Ogg has it: polynomial 0x04c11db7, highest bit first, nothing inverted."""
    register = 0
    for byte in page:
        register ^= byte << 24
        for _ in range(8):
            register = (register << 1) ^ (0x04C11DB7 if register & 0x80000000 else 0)
            register &= 0xFFFFFFFF
    return register


if __name__ == "__main__":
    sys.exit(main())
