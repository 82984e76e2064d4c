"""A speech decoder on disk: published as two pickles, converted once, loaded exactly."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from omnispeech.checkpoint.decoder_config import read_config
from omnispeech.checkpoint.files import assign_weights, build_on_meta
from omnispeech.checkpoint.pickles import is_current, read_conversion, read_pickle, write_conversion
from omnispeech.errors import CheckpointError
from omnispeech.models.flow import Flow
from omnispeech.models.hift import HiFT
from omnispeech.models.speech_decoder import SpeechDecoder

Network = TypeVar("Network", bound=nn.Module)


def load_decoder(
    directory: Path, device: torch.device | str = "cpu", *, convert: bool = True
) -> SpeechDecoder:
    """Reads `config.yaml`, `flow` and `hift` in float32.

    A `.pt` is read once: `convert` writes the same tensors as `.safetensors` beside it, and later
    loads read only those for as long as the `.pt` does not change.
    """
    flow_config, hift_config = read_config(directory / "config.yaml")
    flow = _load(lambda: Flow(flow_config), directory / "flow.pt", device, convert)
    hift = _load(lambda: HiFT(hift_config), directory / "hift.pt", device, convert)
    return SpeechDecoder(flow, hift)


def check_conversion(directory: Path) -> None:
    """Raises CheckpointError for a conversion that holds other tensors than its pickle.

    One of an older pickle is made again by whoever loads it.
    """
    for pickled in (directory / "flow.pt", directory / "hift.pt"):
        converted = pickled.with_suffix(".safetensors")
        if not pickled.exists() or not is_current(converted, pickled):
            continue
        wanted, found = convert_weights(read_pickle(pickled)), read_conversion(converted)
        same = wanted.keys() == found.keys() and all(
            torch.equal(wanted[name], found[name]) for name in wanted
        )
        if not same:
            raise CheckpointError(
                f"{converted} does not hold the tensors of {pickled.name}: delete it, the next "
                "start converts again"
            )


def _load(
    make: Callable[[], Network], pickled: Path, device: torch.device | str, convert: bool
) -> Network:
    model = build_on_meta(make)
    converted = pickled.with_suffix(".safetensors")
    if is_current(converted, pickled):
        assign_weights(model, read_conversion(converted), str(converted))
    else:
        weights = convert_weights(read_pickle(pickled))
        assign_weights(model, weights, str(pickled))
        if convert:
            write_conversion(converted, weights, pickled)
    return model.to(device)  # type: ignore[return-value]


def convert_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain float32 weights by their names in the model: no prefix, no weight norm."""
    # Vocoders of later CosyVoice releases are saved with everything under one name.
    prefix = "generator." if all(name.startswith("generator.") for name in weights) else ""
    plain = {name.removeprefix(prefix): value.detach().float() for name, value in weights.items()}
    for name in [name for name in plain if name.endswith(".weight_g")]:
        base = name.removesuffix("_g")
        if f"{base}_v" in plain:
            plain[base] = fold_weight_norm(plain.pop(name), plain.pop(f"{base}_v"))
    # safetensors takes no views of a common storage
    return {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in plain.items()
    }


def fold_weight_norm(g: Tensor, v: Tensor) -> Tensor:
    """g [C, 1, 1], v [C, ...] -> [C, ...]; dimension 0 also where it is the input channel."""
    length = v.flatten(1).norm(dim=1).view(-1, *[1] * (v.dim() - 1))  # [C, 1, 1]
    return v * (g / length)
