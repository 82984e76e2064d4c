"""`omnispeech tiny`: small random checkpoints."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("directory", type=Path, help="gets OpenS2S and glm-4-voice-decoder")
    parser.add_argument("--wavlm", action="store_true", help="and wavlm-base-plus")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same weights")


def run(args: argparse.Namespace) -> int:
    from omnispeech.tiny.directory import write_tiny

    names = write_tiny(args.directory, seed=args.seed, wavlm=args.wavlm)
    sys.stdout.write(f"wrote {' and '.join(names)} under {args.directory}\n")
    return 0
