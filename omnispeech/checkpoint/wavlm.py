"""A WavLM on disk, and the bridge that was trained between it and one checkpoint.

The WavLM is published as a pickle, which is converted once. A bridge counts only with the two
networks that it was trained between: its config.json has fingerprints of both.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from omnispeech.checkpoint.files import assign_weights, build_on_meta
from omnispeech.checkpoint.models_directory import fetch_command, train_command
from omnispeech.checkpoint.pickles import (
    compare_conversion,
    current_file,
    read_conversion,
    read_pickle,
    read_whole,
    write_conversion,
)
from omnispeech.checkpoint.shards import TensorFiles
from omnispeech.checkpoint.tensor_file import TensorFile
from omnispeech.checkpoint.wavlm_paths import BRIDGE as BRIDGE
from omnispeech.checkpoint.wavlm_paths import WAVLM as WAVLM
from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json
from omnispeech.models.wavlm import (
    D_MODEL,
    Bridge,
    WavLMConfig,
    WavLMEncoder,
    trained_on_normalized,
)

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
SMALL = 1 << 16  # numbers; tensors of up to so many are in a fingerprint, larger ones by shape
FORMAT = 1

# weight norm by its names of before and since torch 2.0: length, direction
NORMED = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeOwners:
    """Fingerprints of the two networks that a bridge was trained between."""

    wavlm: str
    checkpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBridge:
    owners: BridgeOwners
    weights: dict[str, Tensor]  # by the names in `Bridge`, float32


@dataclass(frozen=True)
class WavLMFiles:
    """A WavLM directory, read: settings, and plain float32 weights by the names of WavLMModel."""

    path: Path
    settings: dict[str, Any]  # its config.json
    do_normalize: bool
    weights: dict[str, Tensor]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.weights)

    def config(self, d_model: int) -> WavLMConfig:
        """d_model: width that the adapter of the checkpoint reads."""
        return WavLMConfig(d_model=d_model, do_normalize=self.do_normalize, body=self.settings)


def read_wavlm(directory: Path, *, convert: bool = True) -> WavLMFiles:
    """Raises CheckpointError, with the command that fetches it, if it is not there or not whole.

    The pickle is read once: `convert` writes the same tensors as `.safetensors` beside it, and
    later reads open only those for as long as the pickle does not change.
    """
    config = wavlm_config(directory)
    return WavLMFiles(
        path=directory,
        settings=dict(config.body),
        do_normalize=config.do_normalize,
        weights=_weights(directory, convert),
    )


def wavlm_config(directory: Path, d_model: int = D_MODEL) -> WavLMConfig:
    """From config.json and preprocessor_config.json of a WavLM directory.

    Without the second, clips are normalized as those were that such a network was trained on.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is missing or not whole; bring it with: "
            f"{fetch_command(directory.parent, directory.name)}"
        )
    settings = read_json(directory / "config.json")
    if (kind := settings.get("model_type", "wavlm")) != "wavlm":
        raise CheckpointError(f"{directory} holds a model of type {kind!r} and no WavLM")
    preprocessor = directory / "preprocessor_config.json"
    raw = read_json(preprocessor) if preprocessor.is_file() else {"do_normalize": None}
    if (rate := raw.get("sampling_rate", 16_000)) != 16_000:
        raise CheckpointError(
            f"{preprocessor} has sampling_rate={rate!r}; this program can only do 16000"
        )
    normalize = raw.get("do_normalize", True)  # the default of its class
    if normalize is None:
        normalize = trained_on_normalized(settings)
    return WavLMConfig(d_model=d_model, do_normalize=bool(normalize), body=settings)


def _weights(directory: Path, convert: bool) -> dict[str, Tensor]:
    path = wavlm_file(directory)
    if path.name == WEIGHTS:
        return plain_weights(_read(path), str(path))
    if path.name != PICKLED:
        return read_conversion(path)
    if not path.is_file():
        raise CheckpointError(
            f"{directory} holds neither {WEIGHTS} nor {PICKLED}; "
            f"bring it again with: {fetch_command(directory.parent, directory.name)}"
        )
    weights = plain_weights(read_pickle(path), str(path))
    if convert:
        write_conversion(weights, path)
    return weights


def wavlm_file(directory: Path) -> Path:
    """The weights that `read_wavlm` reads; a pickle that it names may be missing."""
    stored = directory / WEIGHTS
    return stored if stored.is_file() else current_file(directory / PICKLED)


def check_wavlm_conversion(directory: Path) -> None:
    """Raises CheckpointError for a conversion that holds other tensors than its pickle."""
    pickled = directory / PICKLED
    if wavlm_file(directory).name != WEIGHTS:
        compare_conversion(pickled, lambda weights: plain_weights(weights, str(pickled)))


def plain_weights(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """float32, the prefix of larger models taken off, the weight norm of positions folded.

    What only training needs (`masked_spec_embed`) is left out. Raises CheckpointError for a
    Wav2Vec2 under the name of WavLM: without its position bias it is another network.
    """
    plain = {n.removeprefix("wavlm."): w.detach().float() for n, w in weights.items()}
    plain.pop("masked_spec_embed", None)
    for length, direction in NORMED:
        for name in [name for name in plain if name.endswith(length)]:
            base = name.removesuffix(length)
            if f"{base}{direction}" in plain:
                v = plain.pop(f"{base}{direction}")
                plain[f"{base}.weight"] = torch._weight_norm(v, plain.pop(name), 2)
    if not any(name.endswith(".rel_attn_embed.weight") for name in plain):
        raise CheckpointError(
            f"{source} holds no rel_attn_embed: it is a Wav2Vec2 and no WavLM, which has a gated "
            "relative position bias; take the weights of microsoft/wavlm-base-plus"
        )
    return {name: value.contiguous() for name, value in plain.items()}


def fill_wavlm(
    encoder: WavLMEncoder, files: WavLMFiles, device: torch.device, dtype: torch.dtype
) -> None:
    """Puts the weights in place of the meta tensors of `encoder.wavlm`; its bridge is untouched."""
    weights = {name: value.to(device, dtype) for name, value in files.weights.items()}
    assign_weights(encoder.wavlm, weights, str(files.path))


def load_wavlm(
    files: WavLMFiles, d_model: int, device: torch.device, dtype: torch.dtype
) -> WavLMEncoder:
    """For inference, without a bridge: that is still on meta."""
    encoder = build_on_meta(lambda: WavLMEncoder(files.config(d_model)))
    assert isinstance(encoder, WavLMEncoder)
    fill_wavlm(encoder, files, device, dtype)
    return encoder


def checkpoint_fingerprint(tensors: TensorFiles) -> str:
    """Of an OpenS2S: its audio adapter, which a bridge speaks to. Quantizing does not change it."""
    cpu = torch.device("cpu")
    names = [name for name in tensors.names if name.startswith("audio_adapter.")]
    shapes = {name: tensors.shape(name) for name in names}
    small = {n: tensors.read(n, cpu, torch.float32) for n in names if _is_small(shapes[n])}
    return _digest(shapes, small)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    return _digest(shapes, {n: w for n, w in weights.items() if _is_small(shapes[n])})


def _is_small(shape: tuple[int, ...]) -> bool:
    return torch.Size(shape).numel() <= SMALL


def _digest(shapes: Mapping[str, tuple[int, ...]], small: Mapping[str, Tensor]) -> str:
    """Norms, biases and position tables: training changes all of them, and they are read fast."""
    digest = hashlib.sha256()
    for name in sorted(shapes):
        digest.update(f"{name} {list(shapes[name])}\n".encode())
        if name in small:
            digest.update(small[name].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def write_bridge(directory: Path, bridge: Bridge, owners: BridgeOwners) -> None:
    """`model.safetensors` in float32 and `config.json`, into a directory that is there.

    To give it its name when it is whole, and to enter it in the manifest, is for the caller.
    """
    weights = {n: w.detach().float().cpu().contiguous() for n, w in _bridge_state(bridge).items()}
    save_file(weights, directory / WEIGHTS, {"format": "pt"})
    projection = bridge.dimension_projection
    config = {
        "format": FORMAT,
        **asdict(owners),
        "hidden_size": projection.in_features,
        "d_model": projection.out_features,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _bridge_state(bridge: Bridge) -> dict[str, Tensor]:
    """Without the WavLM, if there is one behind it."""
    return {n: w for n, w in bridge.state_dict().items() if not n.startswith("wavlm.")}


def read_bridge(directory: Path) -> StoredBridge:
    """Raises CheckpointError if it is of another format or damaged."""
    raw = read_json(directory / "config.json")
    if raw.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory} has format {raw.get('format')!r}; known: {FORMAT}; train it again with: "
            f"{train_command(directory.parent)} --overwrite"
        )
    try:
        owners = BridgeOwners(wavlm=raw["wavlm"], checkpoint=raw["checkpoint"])
    except KeyError as exc:
        raise CheckpointError(f"{directory / 'config.json'} has no {exc.args[0]}") from exc
    return StoredBridge(owners=owners, weights=_read(directory / WEIGHTS))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    return read_whole(TensorFile(path))
