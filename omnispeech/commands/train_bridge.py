"""`omnispeech train-bridge`: WavLM learns to speak to a checkpoint, from audio without labels."""

import argparse
import sys
from pathlib import Path

from omnispeech.commands.models_flag import add_models, models_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    add_models(parser)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="sound files, in folders of any depth (default: what ships with the project)",
    )
    parser.add_argument(
        "--hold-out",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of the files, to test with (default: 0.1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws those files (default: 0)")
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be heard")
    parser.add_argument("--restart", action="store_true", help="throw an interrupted run away")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bridge")


def run(args: argparse.Namespace) -> int:
    from omnispeech.bridge_training.job import BridgeSettings
    from omnispeech.bridge_training.training import train_bridge

    settings = BridgeSettings(
        models=models_directory(args),
        data=args.data,
        hold_out=args.hold_out,
        seed=args.seed,
        device=args.device,
        dry_run=args.dry_run,
        overwrite=args.overwrite,
        restart=args.restart,
    )
    try:
        report = train_bridge(settings)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; the same command goes on from what was saved\n")
        raise
    lines = report.lines() if report else ["dry run: nothing was written"]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0
