"""`omnispeech small`: the small model that comes with omnispeech."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("directory", type=Path, help="gets OpenS2S and glm-4-voice-decoder")


def run(args: argparse.Namespace) -> int:
    from omnispeech.small.directory import write_small

    names = write_small(args.directory)
    sys.stdout.write(f"wrote {' and '.join(names)} under {args.directory}\n")
    return 0
