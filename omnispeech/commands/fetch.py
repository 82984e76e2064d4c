"""`omnispeech fetch`: brings models from the hub, or what they lack."""

import argparse
import sys
from pathlib import Path

from omnispeech.checkpoint.models_directory import DECODER, OPENS2S
from omnispeech.commands.models_flag import add_models, models_directory
from omnispeech.commands.serve import add_settings
from omnispeech.config import HubConfig
from omnispeech.config_reader import read_hub
from omnispeech.logs import log_to_stdout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="directories: OpenS2S, glm-4-voice-decoder (both are the default), wavlm-base-plus",
    )
    add_models(parser)
    parser.add_argument(
        "--update", action="store_true", help="to what the revision names now, if that has changed"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as flat TOML")
    add_settings(parser.add_argument_group("hub"), HubConfig)


def run(args: argparse.Namespace) -> int:
    """Compares every byte of what is there, and fetches only files that are missing or differ."""
    from omnispeech.download.directory import fetch_all

    log_to_stdout()
    names = [name.rstrip("/") for name in args.names] or [OPENS2S, DECODER]
    hub = read_hub(vars(args), args.config)
    for path in fetch_all(names, models_directory(args), hub, update=args.update):
        sys.stdout.write(f"{path}: whole\n")
    return 0
