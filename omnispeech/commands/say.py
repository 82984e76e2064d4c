"""`omnispeech say`: one spoken question."""

import argparse
from pathlib import Path

from omnispeech.commands.sampling import add_server, sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("question", type=Path, help="a sound file: WAV, FLAC, OGG or MP3")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("reply.wav"),
        metavar="FILE",
        help="default: reply.wav",
    )
    add_server(parser)


def run(args: argparse.Namespace) -> int:
    from omnispeech.client import default_server, say

    server = args.server or default_server()
    return say(args.question, args.output, server, sampling=sampling(args))
