"""What a run did and how good it is: `quantization_report.json`, and the same for people to read.

Everything but `measured` follows from the settings, the model and the calibration: a run that was
interrupted and continued writes the same. `measured` is time and memory of this machine.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import omnispeech
from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.shards import Shards
from omnispeech.json_file import read_json
from omnispeech.quantization.job import Job
from omnispeech.quantization.memory import Peak
from omnispeech.quantization.method import LayerResult
from omnispeech.quantization.output import write_json, write_text
from omnispeech.quantization.plan import work_of
from omnispeech.quantization.progress import duration
from omnispeech.quantization.state import Streams

LOG, JSON = "quantization_report.log", "quantization_report.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Report:
    """Of a finished directory, or of one that was there already."""

    output: Path
    data: Mapping[str, Any]  # as in quantization_report.json
    found: bool = False  # the result was there already, and is what was asked for

    @property
    def loss(self) -> float:
        """Mean over the linears: squared error over the mean square of the output."""
        return self.data["summary"]["loss"]

    @property
    def nearest_loss(self) -> float:
        """The same for plain rounding to nearest."""
        return self.data["summary"]["nearest_loss"]

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the tensors as the source stores them, and as the result does."""
        classes = self.data["sizes"].values()
        return sum(c["original"] for c in classes), sum(c["stored"] for c in classes)

    def lines(self) -> list[str]:
        return report_lines(self.data)

    def summary_lines(self) -> list[str]:
        """How it went, without what each layer was like."""
        return [*_head_lines(self.data), *_end_lines(self.data)]


def read_report(directory: Path, *, found: bool) -> Report:
    """Raises CheckpointError if the directory has none."""
    return Report(directory, read_json(directory / JSON), found)


def write_report(directory: Path, data: Mapping[str, Any]) -> None:
    write_json(directory / JSON, data)
    write_text(directory / LOG, "\n".join(report_lines(data)) + "\n")


def layer_record(
    index: int,
    result: LayerResult,
    digests: Mapping[str, str],
    seconds: float,
    peak: Peak,
) -> dict[str, Any]:
    """What is kept of a finished layer until the report is written."""
    return {
        "layer": index,
        "linears": {
            name: {"loss": r.loss, "nearest_loss": r.nearest_loss, "notes": dict(r.notes)}
            for name, r in result.linears.items()
        },
        "digests": dict(digests),
        "measured": {"seconds": round(seconds, 3), "peak_ram": peak.ram, "peak_vram": peak.vram},
    }


def mean_loss(record: Mapping[str, Any], key: str = "loss") -> float | None:
    """Of one layer; None if all of it was kept."""
    values = [linear[key] for linear in record["linears"].values()]
    return fmean(values) if values else None


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    linears = [linear for record in records for linear in record["linears"].values()]
    scaled = [r["notes"]["scales"] for r in linears if "scales" in r["notes"]]
    return {
        "linears": len(linears),
        "loss": fmean(r["loss"] for r in linears) if linears else 0.0,
        "nearest_loss": fmean(r["nearest_loss"] for r in linears) if linears else 0.0,
        # of the linears that had a choice of channel scales
        "identity_share": scaled.count("identity") / len(scaled) if scaled else None,
    }


def class_sizes(source: LanguageFiles, result: Path) -> dict[str, dict[str, int]]:
    """Bytes of tensors by the kind of module, of the source and of the result."""
    sizes: dict[str, dict[str, int]] = {}
    shards = Shards(result, torch.device("cpu"))
    names = [n for i in range(source.config.num_hidden_layers) for n in source.layer_names(i)]
    for name in (*names, *source.outside_names()):
        size = torch.Size(source.shape(name)).numel() * source.dtype(name).itemsize
        sizes.setdefault(_class(name), {"original": 0, "stored": 0})["original"] += size
    for name in shards.names:
        size = torch.Size(shards.shape(name)).numel() * shards.dtype(name).itemsize
        sizes[_class(name)]["stored"] += size
    return sizes


def run_facts(job: Job, streams: Streams) -> dict[str, Any]:
    """What went in, and what it came to."""
    work = work_of(job.calibration)
    outside = [name.removesuffix(".weight") for name in job.source.outside_names()]
    return {
        "format": FORMAT,
        "signature": dict(job.signature),
        "settings": {
            "method": asdict(job.method),
            "target": job.settings.target,
            "device": job.settings.device,
        },
        "scheme": asdict(job.conversion.scheme),
        "kept": list(job.conversion.kept),
        "unquantized": [*job.conversion.kept, *outside],
        "calibration": {
            "tokens": dict(job.calibration.tokens),
            "positions": work.tokens,  # those of `tokens` and repeated ones
            "sources": list(job.calibration.sources),
            "seq_len": job.calibration.seq_len,
            "longest": work.longest,
        },
        "judged_on": "float" if job.method.compatible else "quantized",
        "sequence_length": streams.longest,
        "batch_tokens": streams.batch_tokens,
        "versions": versions(),
    }


def measured(
    records: Sequence[Mapping[str, Any]], total: Peak, calibration: Peak | None
) -> dict[str, Any]:
    """Layers may be of earlier runs, in other processes."""
    layers = [record["measured"] for record in records]
    return {
        "seconds": round(sum(layer["seconds"] for layer in layers), 3),
        "peak_ram": max([total.ram, *(layer["peak_ram"] for layer in layers)]),
        "peak_vram": max([total.vram, *(layer["peak_vram"] for layer in layers)]),
        "calibration": calibration and {"peak_ram": calibration.ram, "peak_vram": calibration.vram},
        "layers": layers,
    }


def versions() -> dict[str, str]:
    return {
        "omnispeech": omnispeech.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _class(name: str) -> str:
    """model.layers.3.mlp.up_proj.qweight -> mlp.up_proj"""
    parts = name.split(".")[:-1]
    return ".".join(parts[3:] if parts[:2] == ["model", "layers"] else parts)


def report_lines(data: Mapping[str, Any]) -> list[str]:
    return [
        *_head_lines(data),
        *_end_lines(data),
        "",
        *_layer_lines(data["layers"], data["measured"]["layers"]),
        "",
        *_size_lines(data["sizes"]),
        "",
        f"unquantized modules: {', '.join(data['unquantized'])}",
        f"versions: {', '.join(f'{k} {v}' for k, v in data['versions'].items())}",
    ]


def progress_lines(data: Mapping[str, Any]) -> list[str]:
    """Of a run that is not finished."""
    return [*_head_lines(data), "", *_layer_lines(data["layers"], data["measured"]["layers"])]


def _head_lines(data: Mapping[str, Any]) -> list[str]:
    scheme, cost = data["scheme"], data["measured"]
    heard = cost["calibration"]
    return [
        f"{data['settings']['method']['method']} {scheme['bits']} bits, group size "
        f"{scheme['group_size']}, layout {scheme['layout']}",
        *([_loss_text(data)] if data["summary"]["linears"] else []),
        f"calibration tokens: {_tokens_text(data['calibration'])}",
        f"calibration sources: {', '.join(data['calibration']['sources'])}",
        f"{_lengths_text(data)}, micro-batch {data['batch_tokens']} tokens",
        *([f"calibration: {_peak_text(heard)}"] if heard else []),
        f"time {duration(cost['seconds'])}, {_peak_text(cost)}",
    ]


def _end_lines(data: Mapping[str, Any]) -> list[str]:
    return [f"loaded back: every tensor as quantized, first sequence {data['verified']:.2g} away"]


def _loss_text(data: Mapping[str, Any]) -> str:
    total = data["summary"]
    identity = total["identity_share"]
    return (
        f"mean loss {total['loss']:.4g} over {total['linears']} linears, plain rounding "
        f"{total['nearest_loss']:.4g}, on what the {data['judged_on']} model computes"
        + ("" if identity is None else f", channels left unscaled in {identity:.0%}")
    )


def _tokens_text(calibration: Mapping[str, Any]) -> str:
    tokens, positions = calibration["tokens"], calibration["positions"]
    text = ", ".join(f"{kind} {count}" for kind, count in tokens.items())
    if (counted := sum(tokens.values())) == positions:
        return text
    return (
        f"{text}; {counted} of {positions} tokens count, the rest repeat what an earlier sample "
        "began with"
    )


def _lengths_text(data: Mapping[str, Any]) -> str:
    final, longest = data["sequence_length"], data["calibration"]["longest"]
    if final < longest:
        return f"sequences reduced from {longest} to {final} tokens (out of memory)"
    limit = data["calibration"]["seq_len"]
    return f"longest sequence {longest} (" + (f"limit {limit}, " if limit else "") + "not reduced)"


def _peak_text(cost: Mapping[str, int]) -> str:
    device = f", peak device memory {size_text(cost['peak_vram'])}" if cost["peak_vram"] else ""
    return f"peak memory {size_text(cost['peak_ram'])}{device}"


def _layer_lines(
    layers: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]
) -> list[str]:
    lines = []
    for layer, cost in zip(layers, measured, strict=True):
        lines.append(f"layer {layer['layer']}: {cost['seconds']:.1f} s, {_peak_text(cost)}")
        for name, linear in layer["linears"].items():
            notes = ", ".join(
                f"{key} {value}" for key, value in linear["notes"].items() if _short(value)
            )
            lines.append(
                f"  {name:<20} loss {linear['loss']:.4g}  nearest {linear['nearest_loss']:.4g}"
                + (f"  {notes}" if notes else "")
            )
    return lines


def _short(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _size_lines(sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
    return ["size of tensors, source and result:"] + [
        f"  {name:<28} {size['original']:>14,} {size['stored']:>14,} bytes"
        for name, size in sizes.items()
    ]
