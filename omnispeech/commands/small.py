"""`omnispeech small`: the small model that comes with omnispeech."""

import argparse
import sys
from pathlib import Path

from omnispeech.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("directory", help="gets OpenS2S and glm-4-voice-decoder")


def run(args: argparse.Namespace) -> int:
    from omnispeech.checkpoint.models_directory import SMALL
    from omnispeech.small.directory import write_small

    if not args.directory:
        raise ConfigError(f"'' names no directory; for the one you are in: {SMALL} .")
    written = " and ".join(write_small(Path(args.directory), way=SMALL))
    told = f"wrote {written} under" if written else "the small model is there already:"
    sys.stdout.write(f"{told} {args.directory}\n")
    return 0
