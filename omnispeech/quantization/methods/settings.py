"""What can be chosen about a method of quantizing, and which choices contradict each other.

Errors name the flag of the commands that a field is set by.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from omnispeech.errors import ConfigError

MethodName = Literal["awq", "gptq", "rtn"]
Rounding = Literal["gptq", "rtn"]
Duo = Literal["on", "off", "both"]
Arithmetic = Literal["float16", "float32"]

BITS = (4, 8)
DAMPING = 0.01
GROUP_SIZES = (32, 64, 128, 256, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSettings:
    """None: what suits the method; the properties say what that is (spec: quantization 3, 7)."""

    method: MethodName = "awq"
    bits: int = 4
    group_size: int = 128  # input columns that share a scale; -1: the whole row
    zero_point: bool | None = None  # False: symmetric codes around 2 ** (bits - 1)
    rounding: Rounding | None = None  # gptq: each rounding error is made good by later columns
    compatible: bool = False  # AutoAWQ's own recipe; with rtn its range rule
    compatible_dtype: Arithmetic = "float16"  # what AutoAWQ's recipe computes in
    duo_scaling: Duo | None = None  # whether weights, too, shape the grid of channel scales
    apply_clip: bool | None = None  # narrow the range of each group where that lowers the error
    search_step: int = 1  # multiplies the density of the grid of channel scales
    passes: int = 1  # cap of refinements: scales refitted, codes rounded again
    desc_act: bool | None = None  # columns in the order of falling activations
    static_groups: bool | None = None  # groups of neighbours, fixed before rounding starts
    damping: float = DAMPING  # of the mean diagonal, added to the Gram matrix
    salient_quota: float = 0.0  # share of columns with an int8 residual beside the file
    dump_salient: bool = False

    def __post_init__(self) -> None:
        self._check_values()
        if self.method == "awq" and self.bits == 8 and self.zero_point:
            raise ConfigError(
                "8-bit AWQ has no zero points, because it is stored in the GPTQ layout; "
                "leave --zero-point out or use --bits 4"
            )
        if self.compatible:
            self._check_compatible()
        if self.method != "awq":
            self._check_plain()
        self._check_order()
        self._check_salient()

    @property
    def rounds(self) -> Rounding:
        if self.rounding is not None:
            return self.rounding
        return "rtn" if self.method == "rtn" or self.compatible else "gptq"

    @property
    def symmetric(self) -> bool:
        if self.zero_point is not None:
            return not self.zero_point
        return self.method == "gptq" or self.bits == 8

    @property
    def duo(self) -> Duo:
        return self.duo_scaling or ("on" if self.compatible else "both")

    @property
    def clips(self) -> bool:
        """Plain ranges are as good in front of GPTQ (spec 6.4)."""
        if self.apply_clip is not None:
            return self.apply_clip
        return self.method == "awq" and self.rounds == "rtn"

    @property
    def act_order(self) -> bool:
        """AWQ: costs nothing in the file. GPTQ: needs g_idx unless groups are static."""
        if self.desc_act is not None:
            return self.desc_act
        return self.method == "awq" and self.rounds == "gptq"

    @property
    def fixed_groups(self) -> bool:
        return self.method != "gptq" or bool(self.static_groups)

    def _check_values(self) -> None:
        for name, value, allowed in (
            ("method", self.method, get_args(MethodName)),
            ("--bits", self.bits, BITS),
            ("--q-group-size", self.group_size, GROUP_SIZES),
            ("--rounding", self.rounding, (None, *get_args(Rounding))),
            ("--duo_scaling", self.duo_scaling, (None, *get_args(Duo))),
            ("compatible_dtype", self.compatible_dtype, get_args(Arithmetic)),
        ):
            if value not in allowed:
                choices = ", ".join(str(a) for a in allowed if a is not None)
                raise ConfigError(f"{name} is {value!r}; allowed: {choices}")
        for name, count in (("--search-step", self.search_step), ("--iter", self.passes)):
            if type(count) is not int or count < 1:
                raise ConfigError(f"{name} is {count!r}; allowed: whole numbers of at least 1")
        if not 0 < self.damping < 1:
            raise ConfigError(f"damp_percent is {self.damping}; it must lie between 0 and 1")
        if not 0 <= self.salient_quota <= 0.5:
            raise ConfigError(f"--salient-quota is {self.salient_quota}; it must lie in 0 to 0.5")

    def _check_compatible(self) -> None:
        for wrong, reason, advice in (
            (self.method == "gptq", "is AWQ, not gptq", "drop --gptq"),
            (self.rounding == "gptq", "rounds to nearest", "drop --rounding gptq"),
            (self.duo_scaling == "both", "searches one grid", "use --duo_scaling on or off"),
            (
                self.search_step != 1 or self.passes != 1,
                "has a fixed grid and one pass",
                "drop --iter, --search-step and --max_quality",
            ),
            (self.bits != 4, f"is 4 bit, not {self.bits}", "drop --bits"),
            (
                bool(self.salient_quota) or self.dump_salient,
                "knows no salient columns",
                "drop --salient-quota, --dump-salient and --max_quality",
            ),
        ):
            if wrong:
                raise ConfigError(
                    f"AutoAWQ's recipe {reason}; {advice}, or do without --compatible and "
                    "--engine autoawq"
                )

    def _check_plain(self) -> None:
        if self.duo_scaling is not None:
            raise ConfigError(
                f"--duo_scaling shapes AWQ's channel scales; {self.method} has none: drop it"
            )
        if self.method == "gptq" and (self.search_step != 1 or self.apply_clip is not None):
            raise ConfigError(
                "--search-step and --apply_clip are of AWQ's search; GPTQ has none: drop them"
            )
        if self.method == "gptq" and self.zero_point:
            raise ConfigError("GPTQ files are symmetric here; leave --zero-point out")
        if self.method == "gptq" and self.rounding == "rtn":
            raise ConfigError(
                "--gptq is a way of rounding; drop --rounding rtn (rounding to nearest alone is "
                "method rtn), or quantize with --awq"
            )
        if self.method == "rtn" and self.passes != 1:
            raise ConfigError("rtn rounds once; for more passes use method awq or gptq")

    def _check_order(self) -> None:
        if self.method == "rtn" and self.rounding == "gptq":
            raise ConfigError("rtn rounds to nearest; for rounding=gptq use method gptq or awq")
        if self.rounds == "gptq":
            self._check_groups()
            return
        if self.desc_act:
            raise ConfigError(
                f"--desc-act has no effect on round-to-nearest {self.method.upper()}; "
                "use --rounding gptq or drop the flag"
            )
        if self.static_groups:
            raise ConfigError("--static-groups has no effect on rounding to nearest; drop it")

    def _check_groups(self) -> None:
        if self.method == "gptq" and self.static_groups and not self.act_order:
            raise ConfigError(
                "--static-groups has no effect on columns in their own order; add "
                "--gptq_desc_act, or drop it"
            )

    def _check_salient(self) -> None:
        if self.salient_quota and self.rounds == "gptq":
            awq = " with --awq" if self.method == "gptq" else ""
            raise ConfigError(
                "salient columns are already compensated; "
                f"use --dump-salient for analysis or --rounding rtn{awq}"
            )
