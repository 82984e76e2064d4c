"""`omnispeech parity`: against golden numbers."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("directory", type=Path, help="a golden directory of either kind")


def run(args: argparse.Namespace) -> int:
    from omnispeech.parity.golden import compare
    from omnispeech.parity.report import print_report

    return print_report(compare(args.directory))
