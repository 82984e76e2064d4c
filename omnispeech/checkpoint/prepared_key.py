"""What a kernel-ready copy was made from and for: the key that its name and its entry tell."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from omnispeech.checkpoint.kernel_ready import LAYOUT
from omnispeech.layers.int4_matmul import tile_orders
from omnispeech.layers.linear import known_kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What a copy was made from and for: one that differs in anything is not used."""

    source: str  # name of the directory
    identity: str  # sha256 over the hashes of its files
    without: tuple[str, ...]  # language models that came from elsewhere
    kernel: str  # torch or reference
    device: str  # cpu or cuda
    capability: str  # of the processor, as torch names it
    tiles: str  # sha256 over how the kernel lays codes out
    torch: str
    layout: int = LAYOUT

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.told, sort_keys=True).encode()).hexdigest()

    @property
    def told(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return asdict(self) | {"without": list(self.without)}

    def supersedes(self, other: Mapping[str, object]) -> bool:
        """Whether nothing will use the copy of key `other` any more.

        One of another processor or kernel may be in use by another machine, unless the model
        itself is another now. One of another torch is taken for that of before an upgrade: equal
        machines with different versions replace each other's copy, at each start.
        """
        place = ("source", "without", "kernel", "device", "capability")
        mine = self.told
        same = all(other.get(name) == mine[name] for name in place)
        stale = other.get("source") == self.source and other.get("identity") != self.identity
        return other != mine and (same or stale)


@dataclass(frozen=True, slots=True)
class Machine:
    """What weights are repacked for."""

    device: torch.device
    kernel: str = "auto"

    def key(self, source: Path, identity: str, without: Collection[str]) -> Key:
        return Key(
            source=source.name,
            identity=identity,
            without=tuple(sorted(without)),
            kernel=known_kernel(self.kernel),
            device=self.device.type,
            capability=_capability(self.device),
            tiles=hashlib.sha256(tile_orders(self.device)).hexdigest(),
            torch=torch.__version__,
        )


def _capability(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return torch.backends.cpu.get_cpu_capability()
