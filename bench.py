"""Measures: python bench.py NAME, each with --help.

replies (without a name), quantize, accuracy, model, fronts, start, turns, talks
"""

import sys

from benchmarks import accuracy, fronts, model_speed, quantize, replies, start, talks, turns

COMMANDS = {
    "replies": replies.main,
    "quantize": quantize.main,
    "accuracy": accuracy.main,
    "model": model_speed.main,
    "fronts": fronts.main,
    "start": start.main,
    "turns": turns.main,
    "talks": talks.main,
}


def main() -> None:
    arguments = sys.argv[1:]
    named = bool(arguments) and arguments[0] in COMMANDS
    command = COMMANDS[arguments[0] if named else "replies"]
    command(arguments[1:] if named else arguments)


if __name__ == "__main__":
    main()
