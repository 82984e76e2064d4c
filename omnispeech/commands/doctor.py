"""`omnispeech doctor`: what a start would do here."""

import argparse
import sys

from omnispeech.commands import serve
from omnispeech.config import HubConfig, StartConfig
from omnispeech.config_reader import read_hub, read_start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    serve.add_arguments(parser)  # those of the start that is asked about
    serve.add_settings(parser.add_argument_group("start"), StartConfig)
    serve.add_settings(parser.add_argument_group("hub"), HubConfig)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="findings for scripts")


def run(args: argparse.Namespace) -> int:
    """0: a start would succeed, 1: it would not."""
    from omnispeech.deployment.doctor import examine
    from omnispeech.deployment.findings import as_json, as_text, good
    from omnispeech.service import read_settings

    flags, file = vars(args), args.config
    own = read_start(flags, file)
    findings = examine(read_settings(flags, file), read_hub(flags, file), small=own.small)
    sys.stdout.write(f"{as_json(findings)}\n" if args.json else as_text(findings))
    return 0 if good(findings) else 1
