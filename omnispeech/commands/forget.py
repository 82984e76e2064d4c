"""`omnispeech forget`: what was deleted on purpose leaves the manifest."""

import argparse
import sys

from omnispeech.commands.models_flag import add_models, models_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("names", nargs="+", metavar="NAME", help="directories that are gone")
    add_models(parser)


def run(args: argparse.Namespace) -> int:
    from omnispeech.checkpoint.manifest import Manifest

    for name in args.names:
        Manifest(models_directory(args)).forget(name.rstrip("/"))
        sys.stdout.write(f"{name}: forgotten\n")
    return 0
