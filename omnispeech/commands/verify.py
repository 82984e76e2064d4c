"""`omnispeech verify`: models against the manifest."""

import argparse
import sys

from omnispeech.commands.models_flag import add_models, models_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="directories; default: all that are known"
    )
    add_models(parser)
    parser.add_argument("--deep", action="store_true", help="compare every byte")


def run(args: argparse.Namespace) -> int:
    from omnispeech.verification import verify

    status = 0
    for verdict in verify(models_directory(args), args.names, deep=args.deep):
        sys.stdout.write(f"{verdict.name}: {verdict.words}\n")
        status = status if verdict.whole else 1
    return status
