"""A speech decoder on disk: published as two pickles, converted once, loaded exactly."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from omnispeech.checkpoint.decoder_config import read_config
from omnispeech.checkpoint.files import assign_weights, build_on_meta
from omnispeech.checkpoint.pickles import (
    compare_conversion,
    current_file,
    read_conversion,
    read_pickle,
    write_conversion,
)
from omnispeech.models.flow import Flow
from omnispeech.models.hift import HiFT
from omnispeech.models.speech_decoder import SpeechDecoder

PUBLISHED = FLOW, HIFT = "flow.pt", "hift.pt"

Network = TypeVar("Network", bound=nn.Module)


def load_decoder(
    directory: Path, device: torch.device | str = "cpu", *, convert: bool = True
) -> SpeechDecoder:
    """Reads `config.yaml`, `flow` and `hift` in float32.

    A `.pt` is read once: `convert` writes the same tensors as `.safetensors` beside it, and later
    loads read only those for as long as the `.pt` does not change.
    """
    flow_config, hift_config = read_config(directory / "config.yaml")
    flow = _load(lambda: Flow(flow_config), directory / FLOW, device, convert)
    hift = _load(lambda: HiFT(hift_config), directory / HIFT, device, convert)
    return SpeechDecoder(flow, hift)


def decoder_files(directory: Path) -> list[Path]:
    """The weights that `load_decoder` reads, in its order; see `current_file`."""
    return [current_file(directory / name) for name in PUBLISHED]


def check_conversion(directory: Path) -> None:
    """Raises CheckpointError for a conversion that holds other tensors than its pickle."""
    for name in PUBLISHED:
        compare_conversion(directory / name, convert_weights)


def _load(
    make: Callable[[], Network], pickled: Path, device: torch.device | str, convert: bool
) -> Network:
    model = build_on_meta(make)
    path = current_file(pickled)
    is_pickle = path == pickled
    weights = convert_weights(read_pickle(path)) if is_pickle else read_conversion(path)
    assign_weights(model, weights, str(path))
    if is_pickle and convert:
        write_conversion(weights, pickled)
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
