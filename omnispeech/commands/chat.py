"""`omnispeech chat`: a conversation in the terminal."""

import argparse
from pathlib import Path

from omnispeech.commands.sampling import add_server, sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("files", type=Path, nargs="*", help="questions to ask in turn")
    add_server(parser)


def run(args: argparse.Namespace) -> int:
    from omnispeech.client import chat, default_server

    return chat(args.server or default_server(), args.files, sampling=sampling(args))
