"""The command line: `omnispeech COMMAND`, and what `model_worker.py` starts."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from omnispeech import __version__
from omnispeech.commands import serve
from omnispeech.errors import OmniSpeechError

COMMANDS = {
    "serve": "serve a models directory over HTTP",
    "scale": "serve it with many replicas (Ray Serve)",
    "say": "ask a server one spoken question",
    "chat": "talk with a server in the terminal",
    "key": "make an API key",
    "small": "put the small model there that comes with omnispeech: it hears and answers",
    "tiny": "write small random checkpoints",
    "parity": "compare with golden numbers of the originals",
    "train-bridge": "fit WavLM to a checkpoint, from audio without labels",
    "fetch": "bring models from the hub, or what they lack",
    "verify": "check models against the manifest",
    "forget": "take deleted models out of the manifest",
    "doctor": "tell what a start would do, and whether it would succeed",
    "snapshot": "tell whether an image of this disk would start at once",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """`omnispeech COMMAND ...`; the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="omnispeech", description="Speech-to-speech server.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, help in COMMANDS.items():
        command = commands.add_parser(name, help=help)
        if name in given:  # only what is called is imported
            module = import_module(f"omnispeech.commands.{name.replace('-', '_')}")
            module.add_arguments(command)
    return run(parser, given)


def worker(arguments: Sequence[str] | None = None) -> int:
    """`python model_worker.py ...`; the exit status."""
    parser = argparse.ArgumentParser(
        prog="model_worker.py", description="Serves a models directory over HTTP."
    )
    serve.add_arguments(parser)
    return run(parser, arguments)


def startup(place: Path, arguments: Sequence[str] | None = None) -> int:
    """`python startup.py ...`; the exit status, unless it becomes the worker.

    place: the directory of model_worker.py.
    """
    from omnispeech.startup import add_arguments

    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="startup.py",
        description="Fetches what is missing of a models directory, then serves it over HTTP.",
        allow_abbrev=False,
    )
    add_arguments(parser, given, place)
    return run(parser, given)


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Calls what `parser` found; errors made on purpose become one line and status 1."""
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except (OmniSpeechError, OSError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
