"""`omnispeech small`: the small model that comes with omnispeech."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("directory", type=Path, help="gets OpenS2S and glm-4-voice-decoder")


def run(args: argparse.Namespace) -> int:
    from omnispeech.small.directory import write_small

    written = " and ".join(write_small(args.directory))
    told = f"wrote {written} under" if written else "the small model is there already:"
    sys.stdout.write(f"{told} {args.directory}\n")
    return 0
