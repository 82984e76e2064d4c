"""Trained weights -> the two directories the server loads."""

import logging
from pathlib import Path

from torch import Tensor

from omnispeech.tiny.decoder import write_decoder_weights
from omnispeech.tiny.opens2s import write_shards
from training.shape import write_decoder_settings, write_opens2s_settings

logger = logging.getLogger(__name__)

MOST_BYTES = 15_000_000  # of both directories
# Replies are sampled at temperature 1: sharper heads are the same as a lower temperature, and
# leave the likeliest choice as it is.
SHARPER = {"llm_model.lm_head.weight": 2.0, "tts_lm_model.lm_head.weight": 2.0}


def export_opens2s(directory: Path, talk: dict[str, Tensor]) -> None:
    write_opens2s_settings(directory)
    weights = {
        name.removeprefix("model."): weight
        for name, weight in talk.items()
        if name.startswith("model.")
    }
    for name, factor in SHARPER.items():
        weights[name] = weights[name] * factor
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    write_shards(directory, weights, 1)


def export_decoder(directory: Path, flow: dict[str, Tensor], hift: dict[str, Tensor]) -> None:
    write_decoder_settings(directory)
    for file in directory.glob("*.safetensors"):
        file.unlink()  # the server's own conversion of what was there before
    small = {name: half(weight) for name, weight in flow.items()}
    write_decoder_weights(directory, small, {name: w.clone() for name, w in hift.items()})


def half(weight: Tensor) -> Tensor:
    """Matrices in 16 bit. Vectors stay: among them are the constants of the last group norm, beside
    which 16 bit would lose what was learned."""
    return weight.half() if weight.dim() > 1 else weight.clone()


def tell_size(models: Path) -> None:
    size = bytes_in(models)
    fits = "at most" if size <= MOST_BYTES else "too large: more than"
    logger.info("%s: %.1f MB, %s %.0f MB", models, size / 1e6, fits, MOST_BYTES / 1e6)


def bytes_in(models: Path) -> int:
    return sum(file.stat().st_size for file in models.rglob("*") if file.is_file())
