"""`omnispeech snapshot check`: whether an image of this disk, taken now, would start at once.

Settled means: nothing is downloaded, quantized, converted, prepared or compiled by the next start,
and nothing is being written. Looks only: no byte is written, not even the manifest's.
"""

import fcntl
import os
import re
import shlex
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from omnispeech.caches import DIRECTORY, GPU, cache_directory
from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.manifest import FILE_NAME, Manifest
from omnispeech.checkpoint.models_directory import (
    COMMANDS,
    Sources,
    fetch_command,
    make_command,
    verify_command,
)
from omnispeech.checkpoint.prepared import PREPARED
from omnispeech.checkpoint.wavlm_paths import BRIDGE
from omnispeech.config import PlaceConfig
from omnispeech.deployment.findings import Finding, complaints
from omnispeech.deployment.start import changes, choice, conversion, preparation, units
from omnispeech.download.models import MODELS
from omnispeech.download.present import is_filled
from omnispeech.service import Settings, choose_target

QUIET_S = 10.0  # what was written this short a time ago may still be being written
UNFINISHED = (".partial", ".incomplete")  # ours, huggingface_hub's
UNSYNCED = 64 << 20  # bytes; a machine at rest has a little to write at any time


def examine(settings: Settings) -> list[Finding]:
    models = Path(settings.place.models)
    if not models.is_dir():
        return [Finding("wrong", "models", f"{models} is no directory; use --models")]
    findings = [*unfinished(models), *running(models)]
    with complaints("manifest", findings):
        findings += not_entered(models)
        findings += changes(models, Manifest(models).names(), Manifest.check)
    # what has changed the start would compare byte by byte, and write down the result
    unchanged = not any(finding.topic == "manifest" for finding in findings)
    if unchanged and (sources := choice(settings.place, findings)) is not None:
        findings += undone(sources, settings.place)
    findings += [*caches(models), *unsynced(), *sizes(models)]
    return findings


def unfinished(models: Path) -> Iterator[Finding]:
    for path in sorted(models.rglob("*")):
        if path.name.endswith(UNFINISHED):
            yield Finding("wrong", "unfinished", f"{path}: {_finish(path)}, or delete it")


def _finish(path: Path) -> str:
    if fnmatch(path.name, PREPARED):
        return "wait for the start that writes it"
    name = path.name.removeprefix(".").partition(".")[0]
    if name in COMMANDS:
        return f"go on with: {make_command(path.with_name(name))}"
    if name in MODELS:
        return f"go on with: {fetch_command(path.parent, name)}"
    return "wait for what writes it"


def running(models: Path) -> Iterator[Finding]:
    """Downloads and quantizations: each holds a lock for as long as it lives."""
    locks = [path for path in models.rglob("*.lock") if path.is_file()]
    for path in sorted([*locks, *models.glob("*.partial")]):
        if is_locked(path):
            yield Finding(
                "wrong", "running", f"{path} is locked: something is writing; wait for it"
            )


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock of a file or directory; asked without waiting."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def not_entered(models: Path) -> Iterator[Finding]:
    """Directories that the manifest should know and does not, and the other way round."""
    entered = Manifest(models).names()
    for name in (*MODELS, *COMMANDS, BRIDGE):
        if name not in entered and is_filled(models / name):
            command = verify_command(models, name)
            words = f"{models / name} is not in {FILE_NAME}; check and enter it with: {command}"
            yield Finding("wrong", "manifest", words)


def start_command(models: Path) -> str:
    return f"python startup.py --models {shlex.quote(str(models))} --once"


def undone(sources: Sources, place: PlaceConfig) -> list[Finding]:
    """What the next start would still make: here that is wrong, and a note for a start itself."""
    findings: list[Finding] = []
    with complaints("conversion", findings):
        findings.append(conversion(sources))
    with complaints("decoder", findings):
        findings.append(units(sources))
    with complaints("repacking", findings):
        target = choose_target(place)
        findings += preparation(sources, target, prepare=place.prepare)
    settle = f"start it once with: {start_command(Path(place.models))}"
    return [
        Finding("wrong", f.topic, f"{f.words}; {settle}") if f.level == "note" else f
        for f in findings
    ]


def caches(models: Path) -> Iterator[Finding]:
    place = cache_directory(models)
    if place.name.startswith(GPU) and not place.is_dir():
        words = f"no server has started here with this GPU, driver and torch ({place.name})"
        yield Finding("wrong", "caches", f"{words}: start one until it is ready")
    now = time.time()
    files = [path for path in (models / DIRECTORY).rglob("*") if path.is_file()]
    if fresh := [path for path in files if abs(now - path.stat().st_mtime) < QUIET_S]:
        words = f"{fresh[0]} was written less than {QUIET_S:.0f} s ago; wait and ask again"
        yield Finding("wrong", "caches", words)


def unsynced(proc: Path = Path("/proc")) -> Iterator[Finding]:
    """Of the whole machine. It is not for an examination to write: that is what `sync` is for."""
    text = (proc / "meminfo").read_text(encoding="utf-8")
    found = re.findall(r"^(?:Dirty|Writeback):\s+(\d+) kB", text, re.MULTILINE)
    if (waiting := sum(map(int, found)) * 1024) > UNSYNCED:
        words = f"{size_text(waiting)} wait to be written to disks; run sync before the snapshot"
        yield Finding("note", "disk", words)


def sizes(models: Path) -> Iterator[Finding]:
    total = 0
    for path in sorted(models.iterdir()):
        size = disk_size(path)
        total += size
        if path.is_dir():
            yield Finding("ok", "size", f"{path.name}: {size_text(size)}")
    yield Finding("ok", "size", f"{models} as a whole: {size_text(total)}")


def disk_size(path: Path) -> int:
    """Bytes of blocks on the disk; what has two names counts once, links not at all."""
    found = {}
    for file in (path, *path.rglob("*")):
        status = file.lstat()
        found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(found.values())
