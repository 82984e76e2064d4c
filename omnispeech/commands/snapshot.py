"""`omnispeech snapshot check`: whether an image of this disk would start at once."""

import argparse
import sys

from omnispeech.commands import serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser("check", help="list what is not settled; nothing is written")
    serve.add_arguments(check)  # those of the start that is asked about
    check.set_defaults(run=run)
    check.add_argument("--json", action="store_true", help="findings for scripts")


def run(args: argparse.Namespace) -> int:
    """0: an image taken now would start at once, 1: something is not settled."""
    from omnispeech.deployment.findings import Finding, as_json, as_text, good
    from omnispeech.deployment.snapshot import examine
    from omnispeech.service import read_settings

    findings = examine(read_settings(vars(args), args.config))
    settled = good(findings)
    words = "an image taken now starts at once" if settled else "not settled: see above"
    findings.append(Finding("ok" if settled else "note", "snapshot", words))
    sys.stdout.write(f"{as_json(findings)}\n" if args.json else as_text(findings))
    return 0 if settled else 1
