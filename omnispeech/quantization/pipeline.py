"""One decoder layer at a time: read, quantized, packed, written, recorded (spec: quantization 5.2).

A run can be stopped anywhere and goes on with the same command; the directory gets its name when
it is complete and was read back.
"""

from pathlib import Path
from typing import Any

import torch

from omnispeech.calibration.samples import Calibration
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.quantization.existing import check_existing, enter, existing_lines
from omnispeech.quantization.job import Build, Job, run_signature
from omnispeech.quantization.layer_loop import quantize_layers
from omnispeech.quantization.memory import MemoryMonitor, Peak, return_large_blocks, return_memory
from omnispeech.quantization.methods.layer_quantizer import build_method
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.output import (
    check_place,
    check_replaceable,
    is_filled,
    quantization_config,
    sync_tree,
    write_directory,
    write_sidecar,
)
from omnispeech.quantization.plan import make_plan, plan_conversion, work_of
from omnispeech.quantization.progress import Progress
from omnispeech.quantization.report import (
    Report,
    class_sizes,
    measured,
    run_facts,
    summary,
    write_report,
)
from omnispeech.quantization.run_settings import RunSettings
from omnispeech.quantization.state import (
    Streams,
    WorkDirectory,
    full_disk_is_an_error,
    give_name,
    put_back,
)
from omnispeech.quantization.verify import StoredModel, check_digests, check_states


def run(
    source: LanguageFiles,
    calibration: Calibration,
    method: MethodSettings,
    settings: RunSettings,
    output: Path,
    *,
    progress: Progress | None = None,
    build: Build = build_method,
    calibration_peak: Peak | None = None,
) -> Report | None:
    """Quantizes `source` into the directory `output`; None after a dry run.

    A result that is there already is checked, and then reported as found; with `overwrite` it is
    replaced once the new one is complete. calibration_peak: of the memory that making `calibration`
    took, for the report. Raises ConfigError before any work if something is in the
    way, CheckpointError for damaged files, a full disk, or a result that is not what was computed.
    """
    progress = progress or Progress()
    output = output.absolute()
    check_place(output, source.directory)
    Manifest(output.parent).names()  # one that cannot be read is told before the work
    if not settings.dry_run:
        put_back(output)
    if settings.overwrite:
        check_replaceable(output)
    conversion = plan_conversion(source, method, settings)
    signature = run_signature(source, calibration, method, conversion)
    if is_filled(output) and not settings.overwrite and not settings.dry_run:
        return check_existing(output, signature)
    plan = make_plan(source, work_of(calibration), method, settings, output)
    progress.say([*plan.lines(), *existing_lines(output, signature)])
    if settings.dry_run:
        return None
    job = Job(
        source=source,
        calibration=calibration,
        method=method,
        settings=settings,
        conversion=conversion,
        output=output,
        build=build,
        signature=signature,
        calibration_peak=calibration_peak,
    )
    return_large_blocks()
    with full_disk_is_an_error(output), MemoryMonitor() as monitor:
        return _run(job, monitor, progress)


def _run(job: Job, monitor: MemoryMonitor, progress: Progress) -> Report:
    with WorkDirectory.open(job.output, job.signature, restart=job.settings.restart) as work:
        try:
            streams = quantize_layers(job, work, monitor, progress)
        finally:
            progress.finish()
        data = _complete(job, work, streams, monitor)
        give_name(work.result, job.output)
        enter(job.output, job.signature)
        work.remove()
    return Report(job.output, data)


def _complete(
    job: Job, work: WorkDirectory, streams: Streams, monitor: MemoryMonitor
) -> dict[str, Any]:
    """Writes the final directory, reads it back, and reports; returns the report."""
    records = work.records(job.layers)
    outside = _write(job, work)
    return_memory()
    digests = outside | {name: d for record in records for name, d in record["digests"].items()}
    stored = StoredModel(work.result, job.conversion.scheme, job.conversion.kept)
    check_digests(stored, digests, work.result)
    verified = _first_sequence_away(job, stored, streams, work.result)
    data = {
        **run_facts(job, streams),
        "summary": summary(records),
        "layers": [{k: r[k] for k in ("layer", "linears")} for r in records],
        "sizes": class_sizes(job.source, work.result),
        "verified": verified,
        "digests": dict(sorted(digests.items())),
        "measured": measured(records, monitor.total, job.calibration_peak),
    }
    write_report(work.result, data)
    sync_tree(work.result)
    return data


def _write(job: Job, work: WorkDirectory) -> dict[str, str]:
    """The final directory but for the report; digests of the tensors that no layer holds."""
    config = quantization_config(
        job.conversion.scheme, job.conversion.kept, act_order=_stores_order(job.method)
    )
    files = [work.layer_file(i) for i in range(job.layers)]
    digests = write_directory(work.result, job.source, files, config, job.settings.shard_size)
    salient = [path for i in range(job.layers) if (path := work.salient_file(i)).is_file()]
    if salient:
        write_sidecar(work.result, salient)
    return digests


def _first_sequence_away(job: Job, stored: StoredModel, streams: Streams, directory: Path) -> float:
    """The first sequence is the first sample, or the start of it when samples were cut."""
    ended = streams.quantized[0]
    began = job.calibration.samples[0].vectors[: len(ended)].to("cpu", ended.dtype)
    stream = job.stream(streams, [began])
    with torch.no_grad():
        return check_states(stored, job.layers, stream, ended, directory)


def _stores_order(method: MethodSettings) -> bool:
    """Whether columns are of groups that only g_idx can name."""
    return method.act_order and not method.fixed_groups
