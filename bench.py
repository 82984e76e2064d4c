"""Measures: python bench.py [replies | quantize | model | fronts | start], each with --help.

Without a name: replies.
"""

import sys

from benchmarks import fronts, model_speed, quantize, replies, start

COMMANDS = {
    "replies": replies.main,
    "quantize": quantize.main,
    "model": model_speed.main,
    "fronts": fronts.main,
    "start": start.main,
}


def main() -> None:
    arguments = sys.argv[1:]
    named = bool(arguments) and arguments[0] in COMMANDS
    command = COMMANDS[arguments[0] if named else "replies"]
    command(arguments[1:] if named else arguments)


if __name__ == "__main__":
    main()
