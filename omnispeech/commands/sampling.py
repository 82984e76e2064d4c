"""Flags of the commands that talk with a server."""

import argparse
from dataclasses import fields
from typing import Any


def add_server(parser: argparse.ArgumentParser) -> None:
    add_address(parser)
    add_length(parser)
    parser.add_argument(
        "--top-p", type=float, help="of the text: the likeliest words up to this share"
    )
    parser.add_argument("--speech-temperature", type=float, help="of the speech units")
    parser.add_argument("--seed", type=int, help="the same seed gives the same reply")


def add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server",
        metavar="URL",
        help="default: OMNISPEECH_SERVER, or http://127.0.0.1:8000; its key: OMNISPEECH_API_KEY",
    )


def add_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, help="of the text; 0: greedy")
    parser.add_argument("--max-new-tokens", type=int, help="text tokens at most")


def sampling(args: argparse.Namespace) -> Any:
    from omnispeech.client import Sampling

    return Sampling(**{f.name: getattr(args, f.name) for f in fields(Sampling)})
