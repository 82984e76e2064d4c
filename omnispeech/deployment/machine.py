"""The machine and the settings of a start: versions, device, port, disk."""

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import torch

from omnispeech import __version__
from omnispeech.caches import cache_directory
from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.models_directory import nearest
from omnispeech.checkpoint.weight_plan import Target
from omnispeech.config import ServerConfig
from omnispeech.config_reader import PREFIX, unknown_variables
from omnispeech.deployment.findings import Finding
from omnispeech.quantization.memory import free_memory
from omnispeech.server.access.guard import is_loopback, keys_of
from omnispeech.server.access.keys import VARIABLE
from omnispeech.server.access.tls import check_tls
from omnispeech.server.door import listen
from omnispeech.service import Settings

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub")
FOREIGN = (
    *("HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
)


def versions() -> Finding:
    found = [f"{name} {metadata.version(name)}" for name in PACKAGES]
    cuda = torch.version.cuda or "none"
    words = [f"omnispeech {__version__}", f"Python {platform.python_version()}", *found]
    return Finding("ok", "versions", ", ".join([*words, f"CUDA of torch: {cuda}"]))


def environment(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    unknown = unknown_variables(environ)
    for name in unknown:
        yield Finding("note", "environment", f"{name} is no setting: it has no effect")
    ours = sorted(n for n in environ if n.startswith(PREFIX) and n not in unknown)
    for name in (*ours, *(n for n in FOREIGN if environ.get(n))):
        value = "(not shown)" if name == VARIABLE else environ[name]
        yield Finding("ok", "environment", f"{name}={value}")


def port(config: ServerConfig) -> Finding:
    """Raises ConfigError where it cannot be had."""
    listen(config).close()
    return Finding("ok", "port", f"{config.host}:{config.port} is free")


def door(settings: Settings) -> Finding:
    """Who may come in. Raises ConfigError for keys and certificates that cannot be used."""
    check_tls(settings.access)
    host = settings.server.host
    if keys_of(settings.access).needed:
        return Finding("ok", "door", f"{host} asks for an API key")
    if is_loopback(host):
        return Finding("ok", "door", f"{host} asks for no API key; only this machine reaches it")
    words = f"{host} asks for no API key: whoever reaches it may use the server (docs/security.md)"
    return Finding("note", "door", words)


def device(target: Target) -> Finding:
    words = f"{target.device}, in {str(target.dtype).removeprefix('torch.')}"
    if target.device.type == "cuda":
        words += f", {_gpu(target.device)}"
    else:
        words += f", {os.cpu_count()} processors, {torch.get_num_threads()} threads"
    return Finding("ok", "device", f"{words}, {size_text(free_memory(target.device))} free")


def _gpu(device: torch.device) -> str:
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, capability {found.major}.{found.minor}, {size_text(found.total_memory)}"


def disk(models: Path, needed: int) -> Finding:
    """needed: bytes that a start writes, with what should stay free."""
    free = shutil.disk_usage(nearest(models)).free
    if needed > free:
        return Finding(
            "wrong",
            "disk",
            f"{size_text(free)} are free under {models}, {size_text(needed)} are needed: make room",
        )
    return Finding("ok", "disk", f"{size_text(free)} are free under {models}")


def caches(models: Path) -> Finding:
    place = cache_directory(models)
    if not os.access(nearest(models), os.W_OK):
        return Finding("note", "caches", f"{models} cannot be written: a start keeps nothing there")
    return Finding("ok", "caches", f"{place}{'' if place.is_dir() else ' (empty)'}")
