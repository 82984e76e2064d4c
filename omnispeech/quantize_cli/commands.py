"""`quantize.py`, `quantize_llm_awq.py` and `quantize_model_once.py`.

Exit status: 0 done and verified; 1 something failed on the way, or what is there is damaged;
2 refused, as what was asked for does not go with the machine, the model or the data (nothing was
quantized then, and another command line is what helps); 130 interrupted, 143 by SIGTERM.
Nothing heavy is imported before the arguments are known to be right.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omnispeech.errors import ConfigError, OmniSpeechError
from omnispeech.json_file import read_json
from omnispeech.quantize_cli.choices import Choices, choices
from omnispeech.quantize_cli.flags import (
    add,
    add_calibration,
    add_method,
    add_quality,
    add_run,
)
from omnispeech.quantize_cli.streams import open_streams

STARTS_OVER = "nothing is left under the final name, and the same command starts over"
GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


class Stopped(KeyboardInterrupt):
    """SIGTERM: the container is being stopped."""


def quantize(arguments: Sequence[str] | None = None) -> int:
    """`quantize.py`: any Hugging Face text model; the exit status."""
    parser = _parser("quantize.py", "Quantizes a Hugging Face text model with AWQ or GPTQ.")
    add(parser, "--model_path", type=Path, default=Path("/models"), help="default: /models")
    add(parser, "--output_dir", type=Path, help="default: <model_path>/AWQ-4bit, GPTQ-8bit, ...")
    for flags in (add_method, add_quality, add_calibration, add_run):
        flags(parser)
    return _finish(parser, arguments, _quantize)


def quantize_llm_awq(arguments: Sequence[str] | None = None) -> int:
    """`quantize_llm_awq.py`: a language model of OpenS2S; the exit status."""
    parser = _parser(
        "quantize_llm_awq.py", "Quantizes a language model of OpenS2S once, to stay on disk."
    )
    _add_models(parser)
    parser.add_argument("--part", choices=("llm", "speech_lm"), default="llm", help="default: llm")
    for flags in (add_method, add_quality, add_calibration, add_run):
        flags(parser)
    return _finish(parser, arguments, _quantize_llm)


def quantize_model_once(arguments: Sequence[str] | None = None) -> int:
    """`quantize_model_once.py`: all of OpenS2S in 8 bits; the exit status."""
    parser = _parser("quantize_model_once.py", "Writes the whole OpenS2S model in 8 bits.")
    _add_models(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing result")
    return _finish(parser, arguments, _quantize_once)


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)


def _add_models(parser: argparse.ArgumentParser) -> None:
    default = Path(os.environ.get("OMNISPEECH_MODELS") or "/models")
    parser.add_argument("--models", type=Path, default=default, help=f"default: {default}")


def _finish(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    command: Callable[[argparse.Namespace], None],
) -> int:
    open_streams()
    try:
        with _stopped_by_sigterm():
            command(parser.parse_args(arguments))
        return 0
    except ConfigError as error:
        status, message = 2, str(error)
    except (OmniSpeechError, OSError) as error:
        status, message = 1, str(error)
    except KeyboardInterrupt as stop:
        status, message = 143 if isinstance(stop, Stopped) else 130, _interrupted(stop)
    sys.stderr.write(f"{parser.prog}: {message}\n")
    return status


def _interrupted(stop: KeyboardInterrupt) -> str:
    """A note of it says what is kept."""
    notes = getattr(stop, "__notes__", [STARTS_OVER])
    # a terminal has just shown ^C
    line = "\n" if sys.stderr.isatty() else ""
    return f"{line}interrupted; {notes[0]}"


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """As the first process of a container, too, which ignores signals it does not handle."""

    def stop(*_: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _chosen(args: argparse.Namespace) -> Choices:
    """Hides the GPUs where they are not wanted, before anything could ask CUDA for them."""
    chosen = choices(args)
    if chosen.device == "cpu":
        os.environ |= dict.fromkeys(GPUS, "")
    return chosen


def _quantize(args: argparse.Namespace) -> None:
    refuse_opens2s(args.model_path)
    chosen = _chosen(args)

    from omnispeech.quantize_cli.text_model import quantize_text_model

    quantize_text_model(args.model_path, args.output_dir, chosen)


def _quantize_llm(args: argparse.Namespace) -> None:
    chosen = _chosen(args)

    from omnispeech.quantize_cli.opens2s import quantize_part

    quantize_part(args.models, args.part, chosen)


def _quantize_once(args: argparse.Namespace) -> None:
    from omnispeech.quantize_cli.eight_bit import quantize_whole

    quantize_whole(args.models, overwrite=args.overwrite)


def refuse_opens2s(directory: Path) -> None:
    """The speech model is quantized with sound, out of its unified checkpoint."""
    for place, models in ((directory, directory.parent), (directory / "OpenS2S", directory)):
        config = place / "config.json"
        if config.is_file() and "llm_config" in read_json(config):
            raise ConfigError(
                f"{place} is an OpenS2S model, which is calibrated with sound; run: python "
                f"quantize_llm_awq.py --models {models} (with --gptq for GPTQ), or python "
                f"quantize_model_once.py --models {models} for all of it in 8 bits"
            )
