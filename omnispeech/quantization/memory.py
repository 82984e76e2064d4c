"""How much memory there is, and how much a run takes (spec: quantization 7)."""

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from omnispeech.checkpoint.files import size_text
from omnispeech.errors import ConfigError

PAGE = os.sysconf("SC_PAGE_SIZE")
M_MMAP_THRESHOLD = -3  # of mallopt in glibc
UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2 ** 63 for "no limit"
FOREIGN = 1 << 30  # bytes; the libraries of this process take less
STOP_OTHERS = (
    "stop them, which for the server in the container `./build_and_run.sh --quantize` does and "
    "starts it again afterwards, or use --device cpu"
)


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes, the highest seen."""

    ram: int  # resident memory of the process
    vram: int  # reserved on the device by torch; 0 without CUDA

    def __or__(self, other: "Peak") -> "Peak":
        return Peak(max(self.ram, other.ram), max(self.vram, other.vram))


class MemoryMonitor:
    """Samples while the `with` block runs, whatever ends it; never touches CUDA by itself."""

    def __init__(self, *, interval_s: float = 0.5) -> None:
        self._interval = interval_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._lap = self._total = Peak(0, 0)
        self._thread = threading.Thread(target=self._run, name="memory-monitor", daemon=True)

    def __enter__(self) -> "MemoryMonitor":
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def total(self) -> Peak:
        self._sample()
        return self._total

    def lap(self) -> Peak:
        """The peak since the last lap; the next one starts now."""
        self._sample()
        with self._lock:
            lap, self._lap = self._lap, Peak(0, 0)
        return lap

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        now = Peak(resident_memory(), device_memory())
        with self._lock:
            self._lap |= now
            self._total |= now


def resident_memory() -> int:
    """Bytes of this process in RAM now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def device_memory() -> int:
    """Bytes torch holds on the CUDA device now; 0 when nothing has used CUDA yet."""
    return torch.cuda.memory_reserved() if _cuda_in_use() else 0


def return_memory() -> None:
    """Gives freed memory back to the system, so that one layer does not lie beside the next."""
    if _cuda_in_use():
        torch.cuda.empty_cache()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def return_large_blocks() -> None:
    """From now on, memory of a megabyte and more goes back to the system when it is freed.

    The C library would keep blocks of up to 32 MiB, which is what the matrices of a layer are.
    """
    set_option: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, 1 << 20)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of the GPU, or of the machine where `device` is its CPU."""
    return _device_memory(device)[0] if device.type == "cuda" else available_memory()


def freeing_advice(device: torch.device) -> str:
    """How to get more room on a CUDA device: who else holds how much of it."""
    free, total = _device_memory(device)
    held = total - free - torch.cuda.memory_reserved(device)
    if held < FOREIGN:
        return "use --device cpu"
    return f"other processes hold {size_text(held)} of its {size_text(total)}; {STOP_OTHERS}"


def _device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes free and in all; raises ConfigError where others leave none to ask with."""
    try:
        return torch.cuda.mem_get_info(device)
    except RuntimeError as exc:
        reason = str(exc).partition("\n")[0]
        raise ConfigError(f"{device} cannot be used ({reason}); {STOP_OTHERS}") from exc


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process can still take: of the machine, or of its container if that is less."""
    fields = dict(
        line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line
    )
    machine = int(fields["MemAvailable"].split()[0]) * 1024
    return min([machine, *_cgroup_rooms(proc, cgroups)])


def _cgroup_rooms(proc: Path, cgroups: Path) -> list[int]:
    """What each limit above this process leaves; cgroup version 2, then version 1."""
    rooms = []
    for line in _text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            root = cgroups
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = cgroups / "memory"
        else:
            continue
        folder = root / path.lstrip("/")
        # inside a container the path is the host's: then the limits are at the root itself
        rooms += [_room(place, *names) for place in (folder, *folder.parents) if _in(place, root)]
    return [room for room in rooms if room is not None]


def _in(place: Path, root: Path) -> bool:
    return place == root or root in place.parents


def _room(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    limit, usage = _text(folder / limit_name).strip(), _text(folder / usage_name).strip()
    if not limit.isdigit() or not usage.isdigit() or int(limit) > UNLIMITED:
        return None
    pairs = (line.split() for line in _text(folder / "memory.stat").splitlines())
    cache = {name: int(value) for name, value in pairs}.get(cache_name, 0)
    return max(0, int(limit) - int(usage) + cache)  # cached file pages give way


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
