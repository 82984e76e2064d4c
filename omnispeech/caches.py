"""Where the CUDA driver and compilers keep what they made: in the models directory, so that a
snapshot of it holds that too. A directory for each kind of machine, driver and version: what was
made for another is neither used nor lost.
"""

import logging
import os
import re
import shutil
import subprocess
from collections.abc import MutableMapping
from importlib import metadata
from pathlib import Path

logger = logging.getLogger(__name__)

DIRECTORY = ".cache"
VARIABLES = {
    "CUDA_CACHE_PATH": "cuda",  # of the driver: kernels that it compiles for this GPU
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}
GPU = "gpu-"  # how the names of directories of machines with one begin
COMPILERS = ("torch", "triton")  # packages whose version is part of the key
QUERY_S = 10.0  # nvidia-smi wakes the driver where nothing else holds it


def use_caches(models: Path, environ: MutableMapping[str, str] = os.environ) -> None:
    """Names the caches to whatever compiles in this process; to be called before torch is there.

    A variable that is set stays as it is. Where the models directory cannot be written, all do.
    Only a machine with a GPU gets a directory at once: nothing is compiled for a processor.
    """
    if not models.is_dir():
        return  # whoever looks for models there says so
    place = cache_directory(models)
    try:
        if place.name.startswith(GPU):
            place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.info("no caches in %s: %s", place, error.strerror)
        return
    if not os.access(models, os.W_OK):
        logger.debug("%s cannot be written: caches are where each compiler has them", models)
        return
    for variable, name in VARIABLES.items():
        if environ.setdefault(variable, str(place / name)) != str(place / name):
            logger.debug("%s=%s stays", variable, environ[variable])


def cache_directory(models: Path) -> Path:
    """That of this machine; it need not be there."""
    return models / DIRECTORY / cache_key()


def cache_key(proc: Path = Path("/proc")) -> str:
    """As `gpu-nvidia-l4-driver-550.54.15-torch-2.13.0-triton-3.7.0`, or with the processor."""
    versions = [f"{name}-{version}" for name in COMPILERS if (version := _version(name))]
    return "-".join(_plain(part) for part in (nvidia(proc) or f"cpu-{_processor(proc)}", *versions))


def nvidia(proc: Path = Path("/proc")) -> str | None:
    """The GPUs and the driver, asked without torch; None where there are none."""
    try:
        driver = _first(r"Module\s+(?:for \S+\s+)?([\d.]+)", proc / "driver/nvidia/version")
        found = sorted(proc.glob("driver/nvidia/gpus/*/information"))
        names = {_first(r"Model:\s*(.+)", path) for path in found}
    except OSError:
        return _nvidia_smi()
    return _named(names, driver) if names else _nvidia_smi()


def _nvidia_smi() -> str | None:
    """Where a container or a virtual machine shows no files of the driver."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.rpartition(",") for line in shown.stdout.splitlines() if "," in line]
    return _named({name for name, _, _ in rows}, rows[0][2]) if rows else None


def _named(names: set[str], driver: str) -> str:
    return f"{GPU}{'-'.join(sorted(names))}-driver-{driver}"


def _processor(proc: Path) -> str:
    try:
        return _first(r"model name\s*:\s*(.+)", proc / "cpuinfo")
    except OSError:
        return "unknown"


def _first(pattern: str, path: Path) -> str:
    found = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"))
    return found[1].strip() if found else "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
