"""Figures of bench.py quantize and accuracy, for people to read."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Any]
RECIPE, DEFAULT = "AutoAWQ recipe", "default"


@dataclass(frozen=True, slots=True)
class Row:
    """One promise: what is measured, what it has to be, and how to find it among the figures."""

    part: str
    what: str
    wanted: str
    shown: Callable[[Figures], str]


def kl_ratio(outliers: str) -> Callable[[Figures], str]:
    def ratio(quality: Figures) -> str:
        ours, recipe = quality[outliers][DEFAULT]["kl"], quality[outliers][RECIPE]["kl"]
        return f"{ours / recipe:.3f}"

    return ratio


def strong_to_none(quality: Figures) -> str:
    ours, recipe = (
        quality["strong"][m]["kl"] / quality["none"][m]["kl"] for m in (DEFAULT, RECIPE)
    )
    return f"{ours:.2f} (AutoAWQ recipe {recipe:.2f})"


def worse_groups(quality: Figures) -> str:
    results = [quality[outliers][DEFAULT] for outliers in ("none", "moderate", "strong")]
    return f"{sum(r['worse_groups'] for r in results)} of {sum(r['groups'] for r in results)}"


def memory_shown(memory: Figures) -> str:
    shown = []
    for size in (name for name in ("small", "large") if name in memory):
        for who, peak in memory[size].items():
            share = f"{peak['peak_bytes'] / 1e6:.0f} MB, {peak['of_file']:.3f}"
            shown.append(f"{who}, {size} LLM: {share}")
    return "; ".join(shown)


def time_shown(timing: Figures) -> str:
    ratio = timing["ratio_to_autoawq"]
    return (
        f"{ratio['awq only']:.2f} (its recipe {ratio['autoawq recipe']:.2f}, "
        f"default {ratio['default']:.2f})"
    )


def matvec_shown(matvec: Figures) -> str:
    return (
        f"{matvec['times_faster']:.2f} times; {matvec['int4_of_bandwidth']:.2f} of the read "
        f"bandwidth (bfloat16 {matvec['bfloat16_of_bandwidth']:.2f}), {matvec['threads']} threads"
    )


ROWS = (
    Row("quality", "KL, default to AutoAWQ recipe, no outliers", "0.5 or less", kl_ratio("none")),
    Row("quality", "the same, moderate outliers", "0.25 or less", kl_ratio("moderate")),
    Row("quality", "the same, strong outliers", "", kl_ratio("strong")),
    Row("quality", "KL, strong outliers to none", "1.3 or less", strong_to_none),
    Row("quality", "module groups worse than plain rounding", "0", worse_groups),
    Row(
        "sound",
        "KL on text after sound, calibrated on text to on sound",
        "1.5 or more",
        lambda sound: f"{sound['times_better']:.2f}",
    ),
    Row(
        "memory",
        "peak memory, LLM inside a 2 GB file, and share of the file",
        "under 0.25",
        memory_shown,
    ),
    Row("time", "time to AutoAWQ's, AWQ only", "1.5 or less", time_shown),
    Row("matvec", "int4 matvec 4096 x 12288 to bfloat16", "2.5 times or more", matvec_shown),
    Row(
        "resume",
        "killed at random points, continued: identical",
        "all",
        lambda resume: f"{resume['identical']} of {resume['kills']}",
    ),
)


def rows_table(figures: Figures) -> str:
    lines = ["| what | wanted | measured |", "|---|---|---|"]
    for row in ROWS:
        shown = row.shown(figures[row.part]) if row.part in figures else "not run"
        lines.append(f"| {row.what} | {row.wanted} | {shown} |")
    return "\n".join(lines)


def quality_table(quality: Figures) -> str:
    """Mean and standard deviation over the calibration seeds, in nats per token."""
    outliers = ("none", "moderate", "strong")
    lines = [
        "| method | " + " | ".join(f"KL, outliers {name}" for name in outliers) + " | top-1 |",
        "|---" * (len(outliers) + 2) + "|",
    ]
    for method in quality["none"]:
        results = [quality[name][method] for name in outliers]
        kl = [f"{r['kl']:.5f} ± {r['kl_spread']:.5f}" for r in results]
        top1 = "/".join(f"{r['seeds'][0]['divergence']['top1']:.3f}" for r in results)
        lines.append("| " + " | ".join([method, *kl, top1]) + " |")
    return "\n".join(lines)


def accuracy_table(rows: Figures) -> str:
    """Of bench.py accuracy: the ceiling of the judge, then each row; sampled / greedy."""
    lines = [
        "| quantized | language models | KL of the text | KL of the units | text right "
        "| words heard | sentences heard |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ways = [row[way] for way in ("sampled", "greedy") if way in row]
        cells = _own_cells(row) if ways else ["recordings of the right answers", "", "", ""]
        heard = [way["heard"] for way in ways or [row]]
        cells += [_pair(one["accuracy"] for one in heard), _pair(one["exact"] for one in heard)]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def _own_cells(row: Figures) -> list[str]:
    kl = [f"{row['divergence'][part]['kl']:.1e}" for part in ("text", "units")]
    right = _pair(row[way]["text_right"] for way in ("sampled", "greedy"))
    return [f"{row['bytes'] / 1e6:.2f} MB", *kl, right]


def _pair(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.3f}" for value in values)
