"""One language model quantized, by either engine, and what is said about it."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from omnispeech.assembly import choose_device
from omnispeech.calibration.samples import Calibration
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.shards import weight_files
from omnispeech.errors import ConfigError
from omnispeech.quantization import autoawq_engine
from omnispeech.quantization.output import check_place
from omnispeech.quantization.pipeline import run
from omnispeech.quantization.plan import plan_conversion
from omnispeech.quantization.push import check_repository, push_to_hub
from omnispeech.quantization.run_settings import RunSettings
from omnispeech.quantize_cli.calibrate import token_samples
from omnispeech.quantize_cli.choices import Choices

RESTART = "docker restart opens2s-server (without Docker: start model_worker.py again)"
OUTLIERS = "outlier.json"  # of --max_quality, in the result


@dataclass(frozen=True, slots=True)
class Outcome:
    lines: Sequence[str]  # how it went, for people
    data: Mapping[str, Any]  # of quantization_report.json
    found: bool  # it was there already, and was checked again


def say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def quantize_model(
    source: LanguageFiles,
    calibrate: Callable[[torch.device], Calibration],
    chosen: Choices,
    output: Path,
) -> Outcome | None:
    """None after a dry run. calibrate: on the device that was chosen; AutoAWQ reads text itself."""
    say(*chosen.remarks)
    if chosen.push_to:
        check_repository(chosen.push_to)
    check_place(output, source.directory)
    device = choose_device(chosen.device)
    settings = replace(chosen.run, device=str(device))
    if chosen.engine == "autoawq":
        outcome = _by_autoawq(source, chosen, device, output)
    else:
        # misfits are told before the sound is encoded
        plan_conversion(source, chosen.method, settings)
        try:
            calibration = calibrate(device)
        except torch.OutOfMemoryError as exc:
            raise ConfigError(
                "the device is out of memory while the models hear the calibration data; use "
                "--device cpu, or free the device"
            ) from exc
        outcome = _natively(source, calibration, chosen, settings, output)
    if outcome is None:
        say("dry run: nothing was written")
        return None
    if chosen.method.dump_salient:
        _write_salient(chosen.salient_file or output / OUTLIERS, outcome.data)
    return outcome


def _natively(
    source: LanguageFiles,
    calibration: Calibration,
    chosen: Choices,
    settings: RunSettings,
    output: Path,
) -> Outcome | None:
    report = run(source, calibration, chosen.method, settings, output)
    if report is None:
        return None
    head = report.lines()
    return Outcome(head[: head.index("")], report.data, report.found)


def _by_autoawq(
    source: LanguageFiles, chosen: Choices, device: torch.device, output: Path
) -> Outcome | None:
    if device.index:
        raise ConfigError(
            f"AutoAWQ takes the first GPU, not {device}; set CUDA_VISIBLE_DEVICES={device.index}"
        )
    samples = token_samples(source, chosen.calibrate)
    longest = min(chosen.calibrate.seq_len, sum(map(len, samples)))
    job = autoawq_engine.AutoAWQJob(
        source=source,
        samples=samples,
        method=chosen.method,
        settings=chosen.run,
        seq_len=longest,
    )
    data = autoawq_engine.run_autoawq(job, output)
    if data is None:
        return None
    return Outcome(autoawq_engine.report_lines(data), data, data.get("found", False))


def _write_salient(path: Path, data: Mapping[str, Any]) -> None:
    """{name of a linear: its columns with the largest error}"""
    listed = {
        f"model.layers.{layer['layer']}.{name}": linear["notes"]["salient"]
        for layer in data["layers"]
        for name, linear in layer["linears"].items()
        if "salient" in linear["notes"]
    }
    path.write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    say(f"Salient columns listed: {path}")


def weights_size(directory: Path) -> int:
    """Bytes of the weight files of a model."""
    return sum(path.stat().st_size for path in weight_files(directory))


def part_size(source: LanguageFiles) -> int:
    """Bytes of the tensors of one language model."""
    layers = range(source.config.num_hidden_layers)
    names = [*source.outside_names(), *(n for i in layers for n in source.layer_names(i))]
    return sum(torch.Size(source.shape(n)).numel() * source.dtype(n).itemsize for n in names)


def method_name(chosen: Choices) -> str:
    if chosen.method.method == "gptq":
        return "GPTQ"
    if chosen.engine == "autoawq":
        return "AutoAWQ itself, calibrated on text alone"
    return "AutoAWQ's file format and omnispeech's own engine"


def push(chosen: Choices, output: Path) -> None:
    if chosen.push_to:
        say(f"Pushed: {push_to_hub(output, chosen.push_to, private=chosen.private)}")


def gb(size: int) -> str:
    """Two digits behind the point, more for what is small."""
    return f"{size / 1e9:.2f} GB" if size >= 10**8 else f"{size / 1e9:.5f} GB"
