"""A result that is there already: whether it is what was asked for, and whether it is whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnispeech.checkpoint.manifest import Manifest
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.layers.packing import Scheme
from omnispeech.quantization.output import is_filled
from omnispeech.quantization.report import Report, read_report
from omnispeech.quantization.state import (
    different,
    partial_differences,
    partial_path,
    remove_partial,
)
from omnispeech.quantization.verify import StoredModel, check_digests


def check_existing(output: Path, signature: Mapping[str, Any]) -> Report:
    """Raises ConfigError if it is of other settings, CheckpointError if it is not whole."""
    advice = "name another output, or add --overwrite to replace it"
    try:
        report = read_report(output, found=True)
        made = report.data["signature"]
    except (CheckpointError, KeyError) as exc:
        raise ConfigError(
            f"{output} is there already and is no finished result of this program; {advice}"
        ) from exc
    if differences := different(made, dict(signature)):
        raise ConfigError(
            f"{output} is there already and is not what is asked for: {'; '.join(differences)}; "
            f"{advice}"
        )
    verify_directory(report)
    if output.name not in Manifest(output.parent).names():
        enter(output, signature)  # the run was stopped after its last step but one
    remove_partial(output, signature)
    return report


def verify_directory(report: Report) -> None:
    """Raises CheckpointError unless its files are what the manifest and the report say."""
    output, data = report.output, report.data
    manifest = Manifest(output.parent)
    if output.name in manifest.names():
        try:
            manifest.check(output.name, deep=True)
        except CheckpointError as exc:
            raise CheckpointError(f"{exc}; quantize again with --overwrite") from exc
    check_digests(
        StoredModel(output, Scheme(**data["scheme"]), data["kept"]), data["digests"], output
    )


def existing_lines(output: Path, signature: Mapping[str, Any]) -> list[str]:
    """What a run meets where it would write; nothing is checked or changed."""
    lines = []
    if is_filled(output):
        lines.append(f"{output} is there already: {_state_of(output, signature)}")
    if (differences := partial_differences(output, signature)) is not None:
        partial = partial_path(output)
        lines.append(
            f"{partial} is of an interrupted run that is not this one ({'; '.join(differences)}): "
            "--restart throws it away"
            if differences
            else f"{partial} is of an interrupted run, which goes on"
        )
    return lines


def _state_of(output: Path, signature: Mapping[str, Any]) -> str:
    try:
        made = read_report(output, found=True).data["signature"]
    except (CheckpointError, KeyError):
        return "no finished result of this program; name another output, or add --overwrite"
    if differences := different(made, dict(signature)):
        return f"not what is asked for ({'; '.join(differences)}); --overwrite replaces it"
    return "what is asked for; a run without --overwrite checks it and makes nothing"


def enter(output: Path, signature: Mapping[str, Any]) -> None:
    Manifest(output.parent).enter(output.name, signature)
