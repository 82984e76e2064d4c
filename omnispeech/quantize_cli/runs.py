"""One language model quantized, by either engine, and what is said about it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from omnispeech.assembly import choose_device
from omnispeech.calibration.samples import Calibration
from omnispeech.checkpoint.language import LanguageFiles, PartName
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.shards import weight_files
from omnispeech.checkpoint.tensor_file import TensorFile
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.quantization import autoawq_engine
from omnispeech.quantization.memory import MemoryMonitor
from omnispeech.quantization.output import check_place, is_filled, write_text
from omnispeech.quantization.pipeline import run
from omnispeech.quantization.plan import Plan, Work, make_plan
from omnispeech.quantization.push import check_repository, push_to_hub
from omnispeech.quantization.run_settings import RunSettings
from omnispeech.quantization.state import STREAMS, partial_path
from omnispeech.quantize_cli.calibrate import Calibrator, token_samples
from omnispeech.quantize_cli.choices import Choices
from omnispeech.quantize_cli.remarks import remarks
from omnispeech.quantize_cli.streams import say

FETCH = (
    "point --models or OMNISPEECH_MODELS at a models directory, bring it with: omnispeech fetch "
    "OpenS2S --models {0}, or begin with the small model: omnispeech small {0}"
)
RESTART = "docker restart opens2s-server (without Docker: start model_worker.py again)"
OUTLIERS = "outlier.json"  # of --max_quality, in the result
CONTINUES = "finished layers ({}) are kept, and the same command goes on from there"


@dataclass(frozen=True, slots=True)
class Outcome:
    lines: Sequence[str]  # how it went, for people
    data: Mapping[str, Any]  # of quantization_report.json
    found: bool  # it was there already, and was checked again


def open_model(directory: Path, part: PartName | None, advice: str) -> LanguageFiles:
    """Raises ConfigError, with `advice` if it is not there: nothing was started then."""
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory / 'config.json'} is missing: no model is there; {advice}")
    try:
        return LanguageFiles.open(directory, part)
    except CheckpointError as exc:
        raise ConfigError(str(exc)) from exc


def quantize_model(
    source: LanguageFiles, calibrator: Calibrator, chosen: Choices, output: Path
) -> Outcome | None:
    """None after a dry run. AutoAWQ reads text itself, and `calibrator` is not used."""
    say(*remarks(chosen))
    if chosen.push_to:
        check_repository(chosen.push_to)
    check_place(output, source.directory)
    device = choose_device(chosen.device)
    if chosen.engine == "autoawq":
        outcome = _by_autoawq(source, chosen, device, output)
    else:
        outcome = _natively(source, calibrator, chosen, device, output)
    if outcome is None:
        say("dry run: nothing was written")
        return None
    if chosen.method.dump_salient:
        _write_salient(chosen.salient_file or output / OUTLIERS, outcome.data, output)
    return outcome


def _natively(
    source: LanguageFiles,
    calibrator: Calibrator,
    chosen: Choices,
    device: torch.device,
    output: Path,
) -> Outcome | None:
    settings = replace(chosen.run, device=str(device))
    found = is_filled(output) and not (settings.overwrite or settings.dry_run)
    planned = [] if found else _plan_ahead(source, chosen, settings, output).lines()
    calibrator.check(device)
    if settings.dry_run:
        say(*planned, "token numbers are upper bounds: nothing was listened to")
        return None
    with MemoryMonitor() as monitor:
        calibration = _listened(calibrator, device)
    try:
        report = run(
            source,
            calibration,
            chosen.method,
            settings,
            output,
            calibration_peak=monitor.total,
        )
    except KeyboardInterrupt as exc:
        if done := finished_layers(output):
            exc.add_note(CONTINUES.format(done))
        raise
    assert report is not None  # no dry run
    return Outcome(report.summary_lines(), report.data, report.found)


def _plan_ahead(
    source: LanguageFiles, chosen: Choices, settings: RunSettings, output: Path
) -> Plan:
    """With as many tokens as there can be: what cannot fit is refused before anything is heard."""
    most = chosen.calibrate.max_tokens
    work = Work(tokens=most, longest=min(most, chosen.calibrate.seq_len))
    return make_plan(source, work, chosen.method, settings, output)


def _listened(calibrator: Calibrator, device: torch.device) -> Calibration:
    try:
        return calibrator.listen(device)
    except torch.OutOfMemoryError as exc:
        raise CheckpointError(
            "the device is out of memory while the models hear the calibration data; use "
            "--device cpu, or free the device"
        ) from exc


def finished_layers(output: Path) -> int:
    """That an interrupted run has left, from which the same command goes on."""
    streams = partial_path(output) / STREAMS
    return int(TensorFile(streams).metadata["done"]) if streams.is_file() else 0


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


def _write_salient(path: Path, data: Mapping[str, Any], output: Path) -> None:
    """{name of a linear: its columns with the largest error}; inside the result, it is entered."""
    listed = {
        f"model.layers.{layer['layer']}.{name}": linear["notes"]["salient"]
        for layer in data["layers"]
        for name, linear in layer["linears"].items()
        if "salient" in linear["notes"]
    }
    text = json.dumps(listed, indent=1) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
        if output.resolve() in path.resolve().parents:
            manifest = Manifest(output.parent)
            manifest.enter(output.name, manifest.entry(output.name).made)
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
