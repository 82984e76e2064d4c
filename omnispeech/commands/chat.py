"""`omnispeech chat`: a conversation in the terminal."""

import argparse
from pathlib import Path

from omnispeech.commands.sampling import add_address, add_length


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument(
        "files",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="sound files to ask in turn, or - for raw 16-bit mono sound from standard input; "
        "default: the microphone",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="a .wav file for all replies, or - for raw 16-bit mono sound at 24000 Hz on standard "
        "output; default: the loudspeaker, or reply-1.wav and so on where there is none",
    )
    parser.add_argument("--save", type=Path, metavar="DIR", help="keep both sides and the text")
    parser.add_argument(
        "--push-to-talk",
        action="store_true",
        help="Enter begins and ends each question; of a pipe: all of it is one question",
    )
    parser.add_argument("--text", action="store_true", help="replies in text alone")
    _add_details(parser)
    add_address(parser)
    add_length(parser)


def _add_details(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", default="", metavar="TEXT", help="how the model should be")
    parser.add_argument("--voice", default="default", help="default: default")
    parser.add_argument(
        "--rate", type=int, default=24_000, metavar="HZ", help="of a pipe; default: 24000"
    )
    parser.add_argument(
        "--silence-ms",
        type=int,
        default=500,
        metavar="MS",
        help="of silence that end a question; default: 500",
    )


def run(args: argparse.Namespace) -> int:
    from omnispeech.client import default_server
    from omnispeech.terminal.chat import chat
    from omnispeech.terminal.options import ChatOptions

    options = ChatOptions(
        server=args.server or default_server(),
        files=tuple(args.files),
        output=args.output,
        save=args.save,
        push_to_talk=args.push_to_talk,
        text=args.text,
        rate_hz=args.rate,
        silence_ms=args.silence_ms,
        system=args.system,
        voice=args.voice,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
    )
    return chat(options)
