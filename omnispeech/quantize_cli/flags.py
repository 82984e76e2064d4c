"""Flags that the quantizing commands share. Each is known with dashes and with underscores."""

import argparse
from pathlib import Path
from typing import Any

from omnispeech.quantization.run_settings import TARGETS
from omnispeech.quantize_cli.choices import MAX_TOKENS, SEQ_LEN


def add(group: argparse._ActionsContainer, *names: str, **options: Any) -> None:
    """A flag under all of its names, each with dashes and with underscores."""
    stems = [name.removeprefix("--") for name in names]
    spellings = [
        s for stem in stems for s in (stem, stem.replace("_", "-"), stem.replace("-", "_"))
    ]
    options.setdefault("dest", stems[0].replace("-", "_"))
    group.add_argument(*(f"--{spelling}" for spelling in dict.fromkeys(spellings)), **options)


def add_switch(group: argparse._ActionsContainer, *names: str, **options: Any) -> None:
    """--name and --no-name; None when neither is given."""
    add(group, *names, action=argparse.BooleanOptionalAction, default=None, **options)


def add_method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--awq", action="store_true", help="the default")
    which.add_argument("--gptq", action="store_true", help="8 bit unless --bits 4")
    add(group, "--bits", type=int, help="4 or 8 (default: 4 with AWQ, 8 with GPTQ)")
    add(group, "--quant_config", default="{}", metavar="JSON", help="merged with the flags")
    add(group, "--strict-format", action="store_true", help="refuse 8-bit AWQ (written as GPTQ)")
    add(group, "--gptq_group_size", type=int, metavar="N", help="default: 128")
    add(group, "--gptq_desc_act", action="store_true", default=None, help="act-order with g_idx")
    add(group, "--static-groups", action="store_true", default=None, help="act-order, no g_idx")
    add(group, "--gptq_dataset", metavar="NAME", help="as --dataset, for GPTQ")


def add_quality(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quality")
    add(group, "--max_quality", action="store_true", help="slower and better; see the docs")
    add(group, "--keep-fp-layers", metavar="0,1,-1", help="decoder layers that stay float")
    add(group, "--modules_to_not_convert", nargs="+", metavar="NAME", help="that stay float")
    add_switch(group, "--desc-act", help="round columns by falling activation (default: on)")
    add_switch(group, "--zero-point", help="asymmetric codes (default: on, GPTQ: off)")
    add(group, "--q-group-size", type=int, metavar="N", help="32, 64, 128, 256, -1 (default: 128)")
    add(group, "--iter", type=int, metavar="N", help="refinements at most (default: 1)")
    add(group, "--search-step", type=int, metavar="N", help="density of the grid (default: 1)")
    add(group, "--dump-salient", type=Path, metavar="FILE", help="salient columns as JSON")
    add(group, "--salient-quota", type=float, metavar="SHARE", help="with --rounding rtn only")
    add(group, "--rounding", choices=("gptq", "rtn"), help="default: gptq, made good as it goes")
    add(group, "--duo_scaling", nargs="?", const="on", metavar="on|off|both", help="AWQ's grid")
    add_switch(group, "--apply_clip", help="narrow ranges (default: where it helps)")
    add(group, "--compatible", action="store_true", help="AutoAWQ's own recipe")
    add(group, "--version", "--layout", dest="layout", metavar="GEMM", help="or GEMV, gemv_fast")
    add(
        group,
        "--target",
        choices=TARGETS,
        default="torch",
        help="what will run it: its kernels decide what is allowed",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    add(
        group,
        "--calib",
        "--calib_data",
        nargs="+",
        type=str,
        default=(),
        metavar="PATH",
        help="directories, .jsonl, .txt or sound files, or names as --dataset takes them "
        "(default: what ships with the project)",
    )
    add(group, "--calib-text", nargs="+", type=Path, default=(), metavar="FILE", help="text alone")
    add(group, "--dataset", metavar="A,B:64", help="paths, or wikitext2, c4, pileval, ... of a hub")
    add(group, "--calib-split", default="train,valid", metavar="train,valid", help="of --dataset")
    add(group, "--calib-size", "--max_calib_samples", type=int, metavar="N", help="samples at most")
    add(
        group,
        "--seq_len",
        "--max_calib_seq_len",
        type=int,
        metavar="N",
        help=f"tokens of a sample at most, longer ones are cut (default: SEQ_LEN, or {SEQ_LEN})",
    )
    add(
        group, "--max-tokens", type=int, metavar="N", help=f"of all samples (default: {MAX_TOKENS})"
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add(group, "--engine", choices=("native", "autoawq"), default="native")
    add(group, "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_switch(group, "--force_cpu", help="hide every GPU (default: FORCE_CPU, or off)")
    add(
        group, "--batch_size", type=int, default=1, metavar="N", help="samples of --seq_len at once"
    )
    add(group, "--batch-tokens", type=int, metavar="N", help="the same, in tokens")
    add(group, "--shard_size", default="5GB", metavar="5GB", help="of one file at most")
    add(group, "--dry-run", action="store_true", help="plan only: sizes, memory, disk, time")
    add(group, "--restart", action="store_true", help="throw an interrupted run away")
    add(group, "--overwrite", action="store_true", help="replace an existing result")
    add(group, "--push-to-hub", metavar="USER/NAME", help="upload the result")
    add_switch(group, "--private", help="the repository that is pushed to")
