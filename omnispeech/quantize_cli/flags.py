"""Flags that the quantizing commands share. Each is known with dashes and with underscores.

None stands for what was not given: the defaults are put in by `choices`.
"""

import argparse
from pathlib import Path
from typing import Any

from omnispeech.quantization.run_settings import TARGETS
from omnispeech.quantize_cli.choices import MAX_QUALITY, MAX_TOKENS, SEQ_LEN, SPLITS


def add(group: argparse._ActionsContainer, *names: str, **options: Any) -> None:
    """A flag under all of its names; --help lists them, their other spellings are only known."""
    options.setdefault("dest", names[0].removeprefix("--").replace("-", "_"))
    group.add_argument(*names, **options)
    if others := [other for name in names if (other := _other_spelling(name)) not in names]:
        group.add_argument(*others, **{**options, "help": argparse.SUPPRESS})


def _other_spelling(name: str) -> str:
    """--seq_len -> --seq-len, --dry-run -> --dry_run"""
    stem = name.removeprefix("--")
    dashed = stem.replace("_", "-")
    return f"--{stem.replace('-', '_') if stem == dashed else dashed}"


def add_switch(group: argparse._ActionsContainer, *names: str, **options: Any) -> None:
    """--name and --no-name; None when neither is given."""
    add(group, *names, action=argparse.BooleanOptionalAction, default=None, **options)


def _defaults(usual: object, name: str) -> str:
    return f"(default: {usual}; with --max_quality {MAX_QUALITY[name]})"


def add_method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--awq", action="store_true", help="the default")
    which.add_argument("--gptq", action="store_true", help="8 bit unless --bits 4")
    add(group, "--bits", type=int, help="4 or 8 (default: 4; with --gptq 8)")
    add(group, "--quant_config", default="{}", metavar="JSON", help="merged with the flags")
    add(group, "--strict-format", action="store_true", help="refuse 8-bit AWQ (written as GPTQ)")
    add(group, "--gptq_group_size", type=int, metavar="N", help="default: 128")
    add(group, "--gptq_desc_act", action="store_true", default=None, help="act-order with g_idx")
    add(group, "--static-groups", action="store_true", default=None, help="act-order, no g_idx")
    add(group, "--gptq_dataset", metavar="NAME", help="as --dataset, for GPTQ")


def add_quality(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quality")
    add(
        group,
        "--max_quality",
        action="store_true",
        help="slower and better: docs/quantization.md",
    )
    add(
        group,
        "--keep-fp-layers",
        metavar="0,1,-1",
        help=f"decoder layers that stay float {_defaults('none', 'keep_fp_layers')}",
    )
    add(group, "--modules_to_not_convert", nargs="+", metavar="NAME", help="that stay float")
    add_switch(
        group,
        "--desc-act",
        help="round columns by falling activation (default: on; with --gptq or --rounding rtn off)",
    )
    add_switch(
        group, "--zero-point", help="asymmetric codes (default: on; with --gptq or 8 bits off)"
    )
    add(group, "--q-group-size", type=int, metavar="N", help="32, 64, 128, 256, -1 (default: 128)")
    add(group, "--iter", type=int, metavar="N", help=f"refinements at most {_defaults(1, 'iter')}")
    add(
        group,
        "--search-step",
        type=int,
        metavar="N",
        help=f"density of AWQ's grid {_defaults(1, 'search_step')}",
    )
    add(
        group,
        "--dump-salient",
        type=Path,
        metavar="FILE",
        help="salient columns as JSON (with --max_quality: outlier.json in the result)",
    )
    add(group, "--salient-quota", type=float, metavar="SHARE", help="with --rounding rtn only")
    add(
        group,
        "--rounding",
        choices=("gptq", "rtn"),
        help="default: gptq, made good as it goes; with --compatible rtn",
    )
    add(
        group,
        "--duo_scaling",
        nargs="?",
        const="on",
        metavar="on|off|both",
        help="AWQ's grid (default: both; with --compatible on)",
    )
    add_switch(
        group, "--apply_clip", help="narrow ranges (default: with --rounding rtn or --compatible)"
    )
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
    add(group, "--calib-split", metavar="A,B", help=f"of --dataset (default: {SPLITS})")
    add(
        group,
        "--calib-size",
        "--max_calib_samples",
        type=int,
        metavar="N",
        help=f"samples at most {_defaults('all', 'calib_size')}",
    )
    add(
        group,
        "--seq_len",
        "--max_calib_seq_len",
        type=int,
        metavar="N",
        help="tokens of a sample at most, longer ones are cut (default: the environment's SEQ_LEN, "
        f"or {SEQ_LEN}; with --max_quality {MAX_QUALITY['seq_len']})",
    )
    add(
        group,
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"of all samples {_defaults(MAX_TOKENS, 'max_tokens')}",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add(group, "--engine", choices=("native", "autoawq"), default="native")
    add(group, "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_switch(group, "--force_cpu", help="hide every GPU (default: FORCE_CPU, or off)")
    add(
        group,
        "--batch_size",
        type=int,
        default=1,
        metavar="N",
        help="samples of --seq_len at once (default: 1)",
    )
    add(group, "--batch-tokens", type=int, metavar="N", help="the same, in tokens")
    add(group, "--shard_size", default="5GB", metavar="5GB", help="of one file at most")
    add(group, "--dry-run", action="store_true", help="plan only: sizes, memory, disk, time")
    add(group, "--restart", action="store_true", help="throw an interrupted run away")
    add(group, "--overwrite", action="store_true", help="replace an existing result")
    add(group, "--push-to-hub", metavar="USER/NAME", help="upload the result")
    add_switch(group, "--private", help="of the repository that is pushed to")
