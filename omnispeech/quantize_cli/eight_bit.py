"""`quantize_model_once.py`: all of OpenS2S in 8 bits, after which the original can go."""

from pathlib import Path

from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import EIGHT_BIT, OPENS2S
from omnispeech.checkpoint.shards import weight_files
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.json_file import read_json
from omnispeech.quantization.whole_model import KEY, make_whole_model, source_fingerprint
from omnispeech.quantize_cli.runs import FETCH, RESTART
from omnispeech.quantize_cli.streams import say


class Tenths:
    """Says where the work is, every ten percent."""

    def __init__(self) -> None:
        self._said: tuple[str, int] = ("", 0)

    def __call__(self, what: str, done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if tenth and (what, tenth) != self._said:
            self._said = (what, tenth)
            say(f"{what} {10 * tenth} % of {size_text(total)}")


def quantize_whole(models: Path, *, overwrite: bool) -> None:
    """Raises CheckpointError where the original, or an earlier result, is not whole."""
    source, target = models / OPENS2S, models / EIGHT_BIT
    if target.exists() and not overwrite:
        _check_existing(source, target)
        say(f"8-bit model is complete and was checked again: {target}", f"Next: {RESTART}")
        return
    _check_original(source, models)
    say(f"Quantizing all of {source} to 8-bit, tensor by tensor")
    made = make_whole_model(source, target, Tenths(), overwrite=overwrite)
    say(
        f"✅ 8-bit model saved and verified: {target}",
        f"{made.quantized} linears of both language models: {size_text(made.codes)} in 8 bits; "
        f"everything else as it was: {size_text(made.size - made.codes)}",
        f"Largest deviation of a weight: {made.error:.4f} steps of its row (rounding allows 0.5)",
        f"Original model: {size_text(made.source_size)}",
        f"8-bit model: {size_text(made.size)}",
        f"Compression ratio: {made.source_size / made.size:.2f}x",
        "🎉 SUCCESS! 8-bit Quantization Complete",
        f"Next: {RESTART}",
        f"The server needs {source} no longer; quantize_llm_awq.py does",
    )


def _check_existing(source: Path, target: Path) -> None:
    manifest = Manifest(target.parent)
    try:
        manifest.check(target.name, deep=True)
    except CheckpointError as exc:
        raise CheckpointError(f"{exc}; add --overwrite to make it again") from exc
    made_from = manifest.entry(target.name).made.get("source")
    if not source.is_dir() or made_from == source_fingerprint(source):
        return
    if made_from is None:
        raise ConfigError(
            f"{target} is whole, but which model it was made from is not known, as it was entered "
            f"by `omnispeech verify`; keep it, or add --overwrite to make it again from {source}"
        )
    raise ConfigError(
        f"{target} was made from another model than {source}; add --overwrite to replace it"
    )


def _check_original(source: Path, models: Path) -> None:
    """Raises ConfigError for what cannot be quantized; nothing was started then."""
    config = source / "config.json"
    if not config.is_file():
        raise ConfigError(f"{config} is missing: no model is there; {FETCH.format(models)}")
    try:
        if KEY in read_json(config):
            raise ConfigError(f"{source} is in 8 bits already; name the original")
        weight_files(source)
    except CheckpointError as exc:
        raise ConfigError(str(exc)) from exc
