"""What was chosen on the command line, under one set of names, and what contradicts itself.

(spec: quantization 7) Nothing heavy is imported here, so that `--force_cpu` comes before anything
could look for a GPU.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from omnispeech.config_reader import FALSE, TRUE, parse_value
from omnispeech.errors import ConfigError
from omnispeech.quantization.methods.settings import DAMPING, Duo, MethodName, MethodSettings
from omnispeech.quantization.run_settings import (
    SHORTEST,
    RunSettings,
    parse_layers,
    parse_size,
)
from omnispeech.quantize_cli.quant_config import Given, add_given, read_quant_config

SEQ_LEN, MAX_TOKENS, SPLITS = 2048, 65_536, "train,valid"
LAYOUTS = {"gemm": "gemm", "gemv": "gemv", "gemv_fast": "gemv_fast", "gemvfast": "gemv_fast"}
LOADED_AS = ("marlin", "exllama", "exllamav2", "exllama_v2", "ipex", "cpu")
# The guide's own words for --max_quality, as far as they mean something here (spec 7)
MAX_QUALITY = {
    "keep_fp_layers": "0,1,-1",
    "seq_len": 16_384,
    "calib_size": 20_000,
    "max_tokens": 131_072,
    "iter": 40,
    "search_step": 2,
}
FLAGS = {  # attribute of the arguments: (what it sets, its flag)
    "bits": ("bits", "--bits"),
    "q_group_size": ("group_size", "--q-group-size"),
    "gptq_group_size": ("group_size", "--gptq_group_size"),
    "zero_point": ("zero_point", "--zero-point"),
    "layout": ("layout", "--version"),
    "modules_to_not_convert": ("modules", "--modules_to_not_convert"),
    "desc_act": ("desc_act", "--desc-act"),
    "gptq_desc_act": ("desc_act", "--gptq_desc_act"),
    "static_groups": ("static_groups", "--static-groups"),
    "dataset": ("dataset", "--dataset"),
    "gptq_dataset": ("dataset", "--gptq_dataset"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrate:
    """Where the calibration data is from; nothing given: what ships with the project."""

    paths: tuple[Path, ...] = ()  # --calib, --calib_data
    texts: tuple[Path, ...] = ()  # --calib-text: text alone
    mixture: str = ""  # --dataset
    splits: tuple[str, ...] = ("train", "valid")
    seq_len: int = SEQ_LEN
    max_tokens: int = MAX_TOKENS
    max_samples: int | None = None

    def __post_init__(self) -> None:
        if self.texts and (self.paths or self.mixture):
            raise ConfigError("--calib-text is text alone; give it, or --calib and --dataset")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Everything that was chosen, checked against itself."""

    method: MethodSettings
    run: RunSettings  # its device is not chosen yet
    calibrate: Calibrate
    engine: Literal["native", "autoawq"]
    device: str  # auto, cpu, cuda or cuda:N
    salient_file: Path | None  # None: not asked for, or beside the weights
    max_quality: bool
    push_to: str | None
    private: bool | None


def choices(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Choices:
    """Raises ConfigError for what contradicts itself, and for what has no sound meaning."""
    given = _given(args)
    values = {name: one.value for name, one in given.items()}
    if args.engine == "autoawq":
        _check_autoawq(args, values)
    method = _method(args, values)
    layout = _layout(given.get("layout"))
    _check_eight_bits(args, method, layout)
    calibrate = _calibrate(args, values, environ)
    _check_counts(args)
    _check_effects(args, calibrate)
    return Choices(
        method=method,
        run=_run(args, values, layout, calibrate),
        calibrate=calibrate,
        engine=args.engine,
        device=_device(args, environ),
        salient_file=_writable(args.dump_salient),
        max_quality=args.max_quality,
        push_to=args.push_to_hub,
        private=args.private,
    )


def _value(args: argparse.Namespace, name: str, default: Any = None) -> Any:
    """The flag, else what --max_quality means by itself, else the default."""
    value = getattr(args, name)
    if value is not None:
        return value
    return MAX_QUALITY.get(name, default) if args.max_quality else default


def _given(args: argparse.Namespace) -> dict[str, Given]:
    """What flags and --quant_config set, under one set of names."""
    given: dict[str, Given] = {}
    for attribute, (name, flag) in FLAGS.items():
        value = getattr(args, attribute)
        if value is None:
            continue
        if attribute.startswith("gptq_") and not args.gptq:
            raise ConfigError(f"{flag} is of GPTQ; add --gptq, or drop it")
        add_given(given, name, Given(value, flag))
    for name, one in read_quant_config(args.quant_config, gptq=args.gptq).items():
        add_given(given, name, one)
    return given


def _method(args: argparse.Namespace, values: Mapping[str, Any]) -> MethodSettings:
    name: MethodName = "gptq" if args.gptq else "awq"
    return MethodSettings(
        method=name,
        bits=values.get("bits", 8 if args.gptq else 4),
        group_size=values.get("group_size", 128),
        zero_point=values.get("zero_point"),
        rounding=args.rounding,
        compatible=args.compatible or args.engine == "autoawq",
        duo_scaling=_duo(args.duo_scaling),
        apply_clip=args.apply_clip,
        search_step=_search_step(args),
        passes=_value(args, "iter", 1),
        desc_act=values.get("desc_act"),
        static_groups=values.get("static_groups"),
        damping=values.get("damping", DAMPING),
        salient_quota=args.salient_quota or 0.0,
        dump_salient=args.dump_salient is not None or args.max_quality,
    )


def _search_step(args: argparse.Namespace) -> int:
    """--max_quality makes AWQ's grid denser; GPTQ has none."""
    if args.gptq and args.search_step is None:
        return 1
    return int(_value(args, "search_step", 1))


def _duo(text: str | None) -> Duo | None:
    if text is None or text == "both":
        return cast(Duo | None, text)
    if text.lower() not in TRUE + FALSE:
        raise ConfigError(f"--duo_scaling {text!r}; allowed: on, off, both")
    return "on" if text.lower() in TRUE else "off"


def _layout(given: Given | None) -> str | None:
    if given is None:
        return None
    text = given.value.lower()
    if text in LOADED_AS:
        raise ConfigError(
            f"{given.value} is no file layout but how a server arranges weights when it loads "
            "them; write GEMM (the default), which Marlin, ExLlama and the CPU kernels all read"
        )
    if text not in LAYOUTS:
        raise ConfigError(f"{given.where} {given.value!r}; allowed: GEMM, GEMV, gemv_fast")
    return LAYOUTS[text]


def _check_eight_bits(args: argparse.Namespace, method: MethodSettings, layout: str | None) -> None:
    if method.method == "gptq" and layout is not None:
        raise ConfigError(f"--version {layout} is AWQ's; GPTQ has one layout")
    if method.method == "awq" and method.bits == 8 and (layout or args.strict_format):
        raise ConfigError(
            "no server reads 8-bit AWQ; drop --strict-format and --version, and it is written as "
            "symmetric GPTQ with the channel scales of AWQ, or use --bits 4"
        )


def _calibrate(
    args: argparse.Namespace, values: Mapping[str, Any], environ: Mapping[str, str]
) -> Calibrate:
    named = [path for path in args.calib if not Path(path).exists()]
    size = _value(args, "calib_size")
    return Calibrate(
        paths=tuple(Path(path) for path in args.calib if path not in named),
        texts=tuple(args.calib_text),
        mixture=_with_quotas([*named, *values.get("dataset", "").split(",")], size),
        splits=_splits(args.calib_split or SPLITS),
        seq_len=_sequence_length(args, environ),
        max_tokens=_value(args, "max_tokens", MAX_TOKENS),
        max_samples=size,
    )


def _splits(text: str) -> tuple[str, ...]:
    parts = (part.strip() for part in text.split(","))
    return tuple("valid" if part == "validation" else part for part in parts if part)


def _with_quotas(entries: Sequence[str], size: int | None) -> str:
    """--calib-size is shared among the sets that name no number of their own."""
    sets = [entry.strip() for entry in entries if entry.strip()]
    if size is None:
        return ",".join(sets)
    share = -(-size // max(1, len(sets)))
    return ",".join(name if ":" in name else f"{name}:{share}" for name in sets)


def _sequence_length(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    if args.seq_len is None and (text := environ.get("SEQ_LEN")):
        name, length = "SEQ_LEN of the environment", parse_value(int, text, "SEQ_LEN")
    else:
        name, length = "--seq_len", _value(args, "seq_len", SEQ_LEN)
    if length < SHORTEST:
        raise ConfigError(f"{name} is {length}; allowed: {SHORTEST} or more")
    return int(length)


def _run(
    args: argparse.Namespace, values: Mapping[str, Any], layout: str | None, calibrate: Calibrate
) -> RunSettings:
    return RunSettings(
        layout=layout,
        target=args.target,
        keep_fp_layers=parse_layers(_value(args, "keep_fp_layers", "")),
        modules_to_not_convert=tuple(values.get("modules", ())),
        batch_tokens=args.batch_tokens or args.batch_size * min(calibrate.seq_len, SEQ_LEN),
        shard_size=parse_size(args.shard_size),
        overwrite=args.overwrite,
        restart=args.restart,
        dry_run=args.dry_run,
    )


def _writable(path: Path | None) -> Path | None:
    """Known now rather than when the work is done."""
    if path is None:
        return None
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"--dump-salient {path}: {folder} is not a directory")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"--dump-salient {path} cannot be written; name another file")
    return path


def _device(args: argparse.Namespace, environ: Mapping[str, str]) -> str:
    if not (forced := _forced_to_cpu(args, environ)):
        return str(args.device)
    if args.device not in ("auto", "cpu"):
        raise ConfigError(f"{forced} hides every GPU, --device {args.device} asks for one")
    return "cpu"


def _forced_to_cpu(args: argparse.Namespace, environ: Mapping[str, str]) -> str:
    """What hides every GPU, in words; empty if nothing does."""
    if args.force_cpu is not None:
        return "--force_cpu" if args.force_cpu else ""
    text = environ.get("FORCE_CPU", "")
    forced = bool(text) and parse_value(bool, text, "FORCE_CPU")
    return f"FORCE_CPU={text} of the environment" if forced else ""


def _check_counts(args: argparse.Namespace) -> None:
    counts = {
        "--batch_size": args.batch_size,
        "--batch-tokens": args.batch_tokens,
        "--max-tokens": args.max_tokens,
        "--calib-size": args.calib_size,
    }
    for flag, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{flag} is {count}; allowed: 1 or more")


def _check_effects(args: argparse.Namespace, calibrate: Calibrate) -> None:
    """A flag that changes nothing is most likely a mistake."""
    if args.private is not None and not args.push_to_hub:
        raise ConfigError(
            "--private is of the repository that is pushed to; add --push-to-hub USER/NAME, or "
            "drop it"
        )
    if args.calib_split is not None and not calibrate.mixture:
        raise ConfigError(
            "--calib-split chooses among the splits of data sets; add --dataset, or drop it"
        )


def _check_autoawq(args: argparse.Namespace, values: Mapping[str, Any]) -> None:
    """AutoAWQ takes its own options and nothing beyond them."""
    absent = {
        "--gptq": args.gptq,
        "--max_quality": args.max_quality,
        "--keep-fp-layers": args.keep_fp_layers,
        "--dump-salient": args.dump_salient,
        "--salient-quota": args.salient_quota,
        "--rounding gptq": args.rounding == "gptq",
        "--desc-act": values.get("desc_act"),
        # its files have no zero points then, and no server reads such files
        "--no-zero-point that can be loaded": values.get("zero_point") is False,
    }
    if wrong := [flag for flag, value in absent.items() if value]:
        raise ConfigError(f"AutoAWQ has nothing like {wrong[0]}; drop it, or use --engine native")
