"""`--models` of the commands that work on a models directory."""

import argparse
from pathlib import Path

from omnispeech.config import PlaceConfig
from omnispeech.config_reader import build_config


def add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", metavar="DIR", help="default: OMNISPEECH_MODELS, or /models")


def models_directory(args: argparse.Namespace) -> Path:
    return Path(build_config(PlaceConfig, {"models": args.models}, {}).models)
