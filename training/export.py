"""Trained weights -> the two directories the server loads."""

from pathlib import Path

from torch import Tensor

from omnispeech.tiny.decoder import write_decoder_weights
from omnispeech.tiny.opens2s import write_shards
from training.shape import write_decoder_settings, write_opens2s_settings

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
    write_decoder_weights(directory, _plain(flow), _plain(hift))


def _plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.detach().clone().float() for name, w in weights.items()}
