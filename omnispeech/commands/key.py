"""`omnispeech key`: a new API key, and the lines that make it known to a server."""

import argparse
import re
import secrets
import sys

from omnispeech.errors import ConfigError

PREFIX = "os-"
KEY_BYTES = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("name", metavar="NAME", help="whose key it is: told in logs and refusals")


def run(args: argparse.Namespace) -> int:
    """The lines go to stdout, for `>> FILE`; the key is shown beside them, once."""
    from omnispeech.server.access.keys import digest

    if not re.fullmatch(r"[A-Za-z0-9_-]+", args.name):
        raise ConfigError(f"NAME {args.name!r}; allowed: letters, digits, - and _")
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    sys.stdout.write(f'[keys.{args.name}]\nsha256 = "{digest(key).hex()}"\n')
    sys.stdout.flush()
    sys.stderr.write(f"{key}\nis the key of {args.name}; it is kept nowhere: note it now\n")
    return 0
