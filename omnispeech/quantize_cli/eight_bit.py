"""`quantize_model_once.py`: all of OpenS2S in 8 bits, after which the original can go."""

from pathlib import Path

from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import EIGHT_BIT, OPENS2S
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.quantization.whole_model import make_whole_model, source_fingerprint
from omnispeech.quantize_cli.runs import RESTART, gb, say


class Tenths:
    """Says where the work is, every ten percent."""

    def __init__(self) -> None:
        self._said: tuple[str, int] = ("", 0)

    def __call__(self, what: str, done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if tenth and (what, tenth) != self._said:
            self._said = (what, tenth)
            say(f"{what} {10 * tenth} % of {gb(total)}")


def quantize_whole(models: Path, *, overwrite: bool) -> None:
    """Raises CheckpointError where the original, or an earlier result, is not whole."""
    source, target = models / OPENS2S, models / EIGHT_BIT
    if target.exists() and not overwrite:
        _check_existing(source, target)
        say(f"8-bit model is complete and was checked again: {target}", f"Next: {RESTART}")
        return
    say(f"Quantizing all of {source} to 8-bit, tensor by tensor")
    made = make_whole_model(source, target, Tenths(), overwrite=overwrite)
    say(
        f"8-bit model saved and verified: {target}",
        f"{made.quantized} linears of both language models: {gb(made.codes)} in 8 bits; "
        f"everything else as it was: {gb(made.size - made.codes)}",
        f"Largest deviation of a weight: {made.error:.4f} steps of its row (rounding allows 0.5)",
        f"Original model: {gb(made.source_size)}",
        f"8-bit model: {gb(made.size)}",
        f"Compression ratio: {made.source_size / made.size:.2f}x",
        "SUCCESS! 8-bit Quantization Complete",
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
    if source.is_dir() and made_from != source_fingerprint(source):
        raise ConfigError(
            f"{target} was made from another model than {source}; add --overwrite to replace it"
        )
