"""Writes a models directory: an OpenS2S checkpoint and a speech decoder that fits it."""

from collections.abc import Callable
from pathlib import Path

from omnispeech.checkpoint.models_directory import DECODER, OPENS2S
from omnispeech.checkpoint.new_directories import make_directories
from omnispeech.checkpoint.wavlm_paths import WAVLM
from omnispeech.tiny.decoder import write_decoder
from omnispeech.tiny.opens2s import write_opens2s
from omnispeech.tiny.shape import TinyShape
from omnispeech.tiny.wavlm import write_wavlm


def write_tiny(
    directory: Path, seed: int = 0, shape: TinyShape | None = None, *, wavlm: bool = False
) -> list[str]:
    """`directory/OpenS2S`, `directory/glm-4-voice-decoder` and, if asked for,
    `directory/wavlm-base-plus`, each whole or not there -> their names.

    The same seed and shape give the same bytes.
    """
    shape = shape or TinyShape()
    writers: dict[str, Callable[[Path], None]] = {
        OPENS2S: lambda path: write_opens2s(path, seed, shape),
        DECODER: lambda path: write_decoder(path, seed, shape.decoder, shape.units),
    }
    if wavlm:
        writers[WAVLM] = lambda path: write_wavlm(path, seed, shape.wavlm)
    make_directories(directory, writers, {"by": "omnispeech tiny", "seed": seed})
    return list(writers)
