"""What was chosen on the command line, under one set of names, and what contradicts itself.

(spec: quantization 7) Nothing heavy is imported here, so that `--force_cpu` comes before anything
could look for a GPU.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from omnispeech.config import FALSE, TRUE, parse_value
from omnispeech.errors import ConfigError
from omnispeech.quantization.methods.settings import Duo, MethodName, MethodSettings
from omnispeech.quantization.run_settings import (
    SHORTEST,
    RunSettings,
    parse_layers,
    parse_size,
)
from omnispeech.quantize_cli.quant_config import check_agreement, read_quant_config

SEQ_LEN, MAX_TOKENS = 2048, 65_536
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
MAX_QUALITY_REMARKS = (
    "--max_quality: layers 0, 1 and -1 stay float, refined up to 40 times, twice the grid, up to "
    "20000 samples of 16384 tokens within the budget of --max-tokens",
    "--max_quality uses the GPU where there is one: layers pass one by one, so that none runs out "
    "of memory; --force_cpu is there for those who want it",
    "--max_quality lists salient columns and stores no residuals: GPTQ rounding has made them good "
    "already (--rounding rtn --salient-quota 0.004 stores them)",
)


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
        if self.seq_len < SHORTEST:
            raise ConfigError(f"--seq_len {self.seq_len}; allowed: {SHORTEST} or more")
        for flag, value in (("--max-tokens", self.max_tokens), ("--calib-size", self.max_samples)):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} {value}; allowed: 1 or more")


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
    remarks: tuple[str, ...] = field(default=())  # what the user should know before it begins


def forced_to_cpu(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> bool:
    """--force_cpu, else the environment's FORCE_CPU."""
    if args.force_cpu is not None:
        return bool(args.force_cpu)
    text = environ.get("FORCE_CPU", "")
    return bool(text) and parse_value(bool, text, "FORCE_CPU")


def choices(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Choices:
    """Raises ConfigError for what contradicts itself, and for what has no sound meaning."""
    given = _merged(args)
    if args.engine == "autoawq":
        _check_autoawq(args, given)
    method = _method(args, given)
    layout = _layout(given.get("layout"))
    _check_eight_bits(args, method, layout)
    calibrate = _calibrate(args, given, environ)
    return Choices(
        method=method,
        run=_run(args, given, layout, calibrate),
        calibrate=calibrate,
        engine=args.engine,
        device=_device(args, environ),
        salient_file=_writable(args.dump_salient),
        max_quality=args.max_quality,
        push_to=args.push_to_hub,
        private=args.private,
        remarks=tuple(_remarks(args, method)),
    )


def _value(args: argparse.Namespace, name: str, default: Any = None) -> Any:
    """The flag, else what --max_quality means by itself, else the default."""
    value = getattr(args, name)
    if value is not None:
        return value
    return MAX_QUALITY.get(name, default) if args.max_quality else default


def _merged(args: argparse.Namespace) -> dict[str, Any]:
    """Flags and --quant_config under one set of names."""
    flags = {
        "bits": args.bits,
        "group_size": args.q_group_size,
        "zero_point": args.zero_point,
        "layout": args.layout,
        "modules": args.modules_to_not_convert,
        "desc_act": args.desc_act,
        "dataset": args.dataset,
    }
    flags = {name: value for name, value in flags.items() if value is not None}
    for name, value in _of_gptq_flags(args).items():
        check_agreement(flags, name, value, f"--gptq_{name}")
    for name, value in read_quant_config(args.quant_config, gptq=args.gptq).items():
        check_agreement(flags, name, value, "--quant_config")
    return flags


def _of_gptq_flags(args: argparse.Namespace) -> dict[str, Any]:
    names = {"group_size": args.gptq_group_size, "desc_act": args.gptq_desc_act}
    names["dataset"] = args.gptq_dataset
    given = {name: value for name, value in names.items() if value is not None}
    if given and not args.gptq:
        raise ConfigError(f"--gptq_{min(given)} is of GPTQ; add --gptq, or drop it")
    return given


def _method(args: argparse.Namespace, given: Mapping[str, Any]) -> MethodSettings:
    name: MethodName = "gptq" if args.gptq else "awq"
    return MethodSettings(
        method=name,
        bits=given.get("bits", 8 if args.gptq else 4),
        group_size=given.get("group_size", 128),
        zero_point=given.get("zero_point"),
        rounding=args.rounding,
        compatible=args.compatible or args.engine == "autoawq",
        duo_scaling=_duo(args.duo_scaling),
        apply_clip=args.apply_clip,
        search_step=_search_step(args),
        passes=_value(args, "iter", 1),
        desc_act=given.get("desc_act"),
        static_groups=args.static_groups or given.get("static_groups"),
        salient_quota=args.salient_quota or 0.0,
        dump_salient=args.dump_salient is not None or args.max_quality,
        **{name: given[name] for name in ("damping",) if name in given},
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


def _layout(text: str | None) -> str | None:
    if text is None:
        return None
    if text.lower() in LOADED_AS:
        raise ConfigError(
            f"{text} is no file layout but how a server arranges weights when it loads them; "
            "write GEMM (the default), which Marlin, ExLlama and the CPU kernels all read"
        )
    if text.lower() not in LAYOUTS:
        raise ConfigError(f"--version {text!r}; allowed: GEMM, GEMV, gemv_fast")
    return LAYOUTS[text.lower()]


def _check_eight_bits(args: argparse.Namespace, method: MethodSettings, layout: str | None) -> None:
    if method.method == "gptq" and layout is not None:
        raise ConfigError(f"--version {layout} is AWQ's; GPTQ has one layout")
    if method.method == "awq" and method.bits == 8 and (layout or args.strict_format):
        raise ConfigError(
            "no server reads 8-bit AWQ; drop --strict-format and --version, and it is written as "
            "symmetric GPTQ with the channel scales of AWQ, or use --bits 4"
        )


def _calibrate(
    args: argparse.Namespace, given: Mapping[str, Any], environ: Mapping[str, str]
) -> Calibrate:
    splits = tuple(part.strip() for part in args.calib_split.split(",") if part.strip())
    names = {"validation": "valid"}
    paths = tuple(Path(p) for p in args.calib if Path(p).exists())
    named = [p for p in args.calib if not Path(p).exists()]
    size = _value(args, "calib_size")
    return Calibrate(
        paths=paths,
        texts=tuple(args.calib_text),
        mixture=_with_quotas([*named, *given.get("dataset", "").split(",")], size),
        splits=tuple(names.get(split, split) for split in splits),
        seq_len=_sequence_length(args, environ),
        max_tokens=_value(args, "max_tokens", MAX_TOKENS),
        max_samples=size,
    )


def _with_quotas(entries: Sequence[str], size: int | None) -> str:
    """--calib-size is shared among the sets that name no number of their own."""
    sets = [entry.strip() for entry in entries if entry.strip()]
    if size is None:
        return ",".join(sets)
    share = -(-size // max(1, len(sets)))
    return ",".join(name if ":" in name else f"{name}:{share}" for name in sets)


def _sequence_length(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    if args.seq_len is None and (text := environ.get("SEQ_LEN")):
        return int(parse_value(int, text, "SEQ_LEN"))
    return int(_value(args, "seq_len", SEQ_LEN))


def _run(
    args: argparse.Namespace, given: Mapping[str, Any], layout: str | None, calibrate: Calibrate
) -> RunSettings:
    for flag, value in (("--batch_size", args.batch_size), ("--batch-tokens", args.batch_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}; allowed: 1 or more")
    return RunSettings(
        layout=layout,
        target=args.target,
        keep_fp_layers=parse_layers(_value(args, "keep_fp_layers", "")),
        modules_to_not_convert=tuple(given.get("modules", ())),
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
    if not forced_to_cpu(args, environ):
        return str(args.device)
    if args.device not in ("auto", "cpu"):
        raise ConfigError(f"--force_cpu hides every GPU, --device {args.device} asks for one")
    return "cpu"


def _remarks(args: argparse.Namespace, method: MethodSettings) -> list[str]:
    remarks = list(MAX_QUALITY_REMARKS) if args.max_quality else []
    if method.method == "awq" and method.bits == 8:
        remarks.append(
            "8-bit AWQ is written as symmetric GPTQ v1 with the channel scales of AWQ folded in: "
            "no server reads 8-bit AWQ files"
        )
    if method.method == "awq" and method.zero_point is False:
        remarks.append("--no-zero-point: codes are symmetric, stored with zero points of 8")
    if method.salient_quota:
        remarks.append("residuals of salient columns are read by omnispeech alone")
    if method.method == "gptq" and method.act_order and not method.fixed_groups:
        remarks.append(
            "act-order with g_idx: servers run it slower, and copy its scales to every GPU; "
            "--static-groups has most of the gain without"
        )
    return remarks


def _check_autoawq(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """AutoAWQ takes its own options and nothing beyond them."""
    absent = {
        "--gptq": args.gptq,
        "--max_quality": args.max_quality,
        "--keep-fp-layers": args.keep_fp_layers,
        "--dump-salient": args.dump_salient,
        "--salient-quota": args.salient_quota,
        "--rounding gptq": args.rounding == "gptq",
        "--desc-act": given.get("desc_act"),
        # its files have no zero points then, and no server reads such files
        "--no-zero-point that can be loaded": given.get("zero_point") is False,
    }
    if wrong := [flag for flag, value in absent.items() if value]:
        raise ConfigError(f"AutoAWQ has nothing like {wrong[0]}; drop it, or use --engine native")
