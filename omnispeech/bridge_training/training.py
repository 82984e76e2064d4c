"""`omnispeech train-bridge`: audio in, `wavlm-bridge/` out.

A run can be stopped anywhere and goes on with the same command; the directory gets its name when
it is complete, and its entry in the manifest after that.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from omnispeech.bridge_training.clips import AudioFile, Split
from omnispeech.bridge_training.fitting import (
    FRAMES_PER_S,
    Fitted,
    check_amount,
    columns,
    fit_bridge,
)
from omnispeech.bridge_training.held_out import HeldOut
from omnispeech.bridge_training.job import BridgeSettings, Job, open_job
from omnispeech.bridge_training.listeners import Listeners
from omnispeech.bridge_training.listening import Listening, Statistics
from omnispeech.bridge_training.report import (
    CONSTANT,
    JSON,
    TRAINED,
    UNTRAINED,
    BridgeReport,
    read_report,
)
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.wavlm import write_bridge
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.models.wavlm import Bridge
from omnispeech.quantization.output import is_filled, sync_tree, write_json
from omnispeech.quantization.progress import Progress, duration
from omnispeech.quantization.state import (
    WorkDirectory,
    different,
    full_disk_is_an_error,
    give_name,
    partial_differences,
    partial_path,
    put_back,
    remove_partial,
)

LEAST_S = 1.0  # of audio to choose or to test with: one frame alone has no variance


def train_bridge(settings: BridgeSettings, progress: Progress | None = None) -> BridgeReport | None:
    """None after a dry run. A result that is there is checked and reported as found.

    Raises ConfigError before any work for what cannot be done, CheckpointError for damaged
    files, a full disk, and a bridge that turned out no better than a constant.
    """
    progress = progress or Progress(count="heard {} of {} s", every_s=5.0)
    job = open_job(settings)
    progress.say(_plan_lines(job))
    check_amount(round(_seconds(job.split.training) * FRAMES_PER_S), job.untrained)
    _check_shares(job.split)
    if settings.dry_run:
        return None
    put_back(job.output)
    if is_filled(job.output) and not settings.overwrite:
        return _existing(job)
    with (
        full_disk_is_an_error(job.output),
        WorkDirectory.open(job.output, job.signature, restart=settings.restart) as work,
    ):
        report = _trained(job, work, progress)
        give_name(work.result, job.output)
        Manifest(job.output.parent).enter(job.output.name, report.made)
        work.remove()
    return report


def _plan_lines(job: Job) -> list[str]:
    parts = job.split
    named = {"fit": parts.training, "choose the ridge": parts.validation, "test": parts.held_out}
    listed = ", ".join(f"{len(f)} ({duration(_seconds(f))}) to {what}" for what, f in named.items())
    lines = [f"Files: {listed}"]
    if is_filled(job.output):
        lines.append(f"{job.output} is there already")
    if partial_differences(job.output, job.signature) == []:
        lines.append(f"{partial_path(job.output)} is of an interrupted run, which goes on")
    return lines


def _check_shares(parts: Split) -> None:
    """Raises ConfigError for files that have next to nothing to choose or to test with."""
    for what, files in (("choose the ridge", parts.validation), ("test", parts.held_out)):
        if (seconds := _seconds(files)) < LEAST_S:
            raise ConfigError(
                f"{seconds:.2f} s of audio to {what} with ({len(files)} files: {files[0].name}"
                f"{' ...' if len(files) > 1 else ''}); {LEAST_S:g} s or more are needed: take such "
                "short files out of the data, draw others with --seed, or raise --hold-out"
            )


def _seconds(files: tuple[AudioFile, ...]) -> float:
    return sum(file.seconds for file in files)


def _existing(job: Job) -> BridgeReport:
    """Entered if the run that made it was stopped just before that."""
    advice = "add --overwrite to replace it"
    try:
        report = read_report(job.output)
    except (CheckpointError, OSError) as exc:
        raise ConfigError(
            f"{job.output} is there already and not of this program; {advice}"
        ) from exc
    if differences := different(report.data["signature"], dict(job.signature)):
        raise ConfigError(
            f"{job.output} is there already and is not what is asked for: "
            f"{'; '.join(differences)}; {advice}"
        )
    manifest = Manifest(job.output.parent)
    if job.output.name not in manifest.names():
        manifest.enter(job.output.name, report.made)
    try:
        manifest.check(job.output.name, deep=True)
    except CheckpointError as exc:
        raise CheckpointError(f"{exc} ({advice})") from exc
    remove_partial(job.output, job.signature)
    return report


def _trained(job: Job, work: WorkDirectory, progress: Progress) -> BridgeReport:
    began = time.monotonic()
    listeners = job.listeners()
    try:
        statistics = Listening(work.path, job.untrained).run(job.split, listeners, progress)
    finally:
        progress.finish()
    heard = time.monotonic()
    progress.say(["fitting (half a minute at the published sizes)"])
    fitted = fit_bridge(statistics, job.untrained)
    fitting_s = time.monotonic() - heard
    progress.say([f"testing on {len(job.split.held_out)} files that were held out"])
    held_out = _tested(job, listeners, fitted.bridge, statistics)
    data = {
        "signature": dict(job.signature),
        "audio": _audio_facts(job, statistics),
        "fit": _fit_facts(fitted, statistics),
        "errors": held_out.errors(),
        "held_out_files": held_out.by_file(TRAINED),
        "measured": {
            "device": str(job.device),
            "total_s": time.monotonic() - began,  # of this run
            "listening_s": statistics.took_s,  # of interrupted runs as well
            "listened_s": statistics.seconds,
            "fitting_s": fitting_s,
        },
    }
    _check_better(data["errors"]["encoder"])
    return _write(job, work.result, fitted, data)


def _tested(job: Job, listeners: Listeners, bridge: Bridge, statistics: Statistics) -> HeldOut:
    everything = statistics.training + statistics.validation
    mean = (everything.y / everything.frames).to(job.device, torch.float32)
    test = HeldOut(
        {
            CONSTANT: lambda heard: mean.expand(len(heard.frames), -1),
            UNTRAINED: lambda heard: heard.bridged(job.untrained),
            TRAINED: lambda heard: heard.bridged(bridge),
        }
    )
    for file in job.split.held_out:
        for clip in file.clips():
            if heard := listeners.hear(clip, file.name):
                test.add(file.name, heard, listeners)
    return test


def _check_better(errors: Mapping[str, float]) -> None:
    if errors[TRAINED] >= errors[CONSTANT]:
        raise CheckpointError(
            f"the bridge is no better than a constant on files it has not heard (relative error "
            f"{errors[TRAINED]:.3f} against {errors[CONSTANT]:.3f}); nothing was written: train on "
            "more audio, of the kind that will be heard"
        )


def _audio_facts(job: Job, statistics: Statistics) -> dict[str, Any]:
    data, parts = job.settings.data, job.split
    kinds = {k: getattr(parts, k) for k in ("training", "validation", "held_out")}
    return {
        "directory": str(data.absolute()) if data else "shipped with the project",
        "digest": parts.digest,
        "hold_out": job.settings.hold_out,
        "seed": job.settings.seed,
        **{k: {"files": len(f), "seconds": _seconds(f)} for k, f in kinds.items()},
    }


def _fit_facts(fitted: Fitted, statistics: Statistics) -> dict[str, Any]:
    return {
        "frames": int(statistics.training.frames + statistics.validation.frames),
        "columns": columns(fitted.bridge),
        "ridge": fitted.ridge,
        "relative_error": fitted.error,
    }


def _write(job: Job, directory: Path, fitted: Fitted, data: Mapping[str, Any]) -> BridgeReport:
    directory.mkdir()
    write_bridge(directory, fitted.bridge, job.owners)
    write_json(directory / JSON, data)
    sync_tree(directory)
    return BridgeReport(job.output, data)
