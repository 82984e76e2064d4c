"""How a quantization run is carried out: place, size and speed. What is computed is the method's.

(spec: quantization 2.12, 5.2 and 7)
"""

import re
from dataclasses import dataclass

from omnispeech.errors import ConfigError

LAYOUTS = ("gemm", "gemv", "gemv_fast", "gptq")
TARGETS = ("torch", "vllm", "sglang", "transformers-marlin")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SHORTEST = 64  # tokens: sequences are not split below that when memory runs out


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    layout: str | None = None  # None: gptq for GPTQ and for 8 bits, otherwise gemm
    target: str = "torch"  # who is going to run the file: its kernels decide what is allowed
    keep_fp_layers: tuple[int, ...] = ()  # decoder layers left in float16, negative from the end
    modules_to_not_convert: tuple[str, ...] = ()  # names, or parts of names as AutoAWQ takes them
    device: str = "cpu"
    batch_tokens: int = 2048  # calibration tokens that go through a layer together
    shard_size: int = 5 * 10**9  # bytes of tensors in one file
    overwrite: bool = False  # replace an existing result
    restart: bool = False  # throw away what an interrupted run has left
    dry_run: bool = False  # plan only

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in LAYOUTS:
            raise ConfigError(f"unknown layout {self.layout!r}; known: {', '.join(LAYOUTS)}")
        if self.target not in TARGETS:
            raise ConfigError(f"unknown target {self.target!r}; known: {', '.join(TARGETS)}")
        for name in ("batch_tokens", "shard_size"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={value} is not a positive whole number")


def parse_size(text: str | int) -> int:
    """ "5GB", "500 MB", "2GiB" or a number of bytes -> bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in UNITS:
        raise ConfigError(f"{text!r} is not a size; write it like 5GB, 500MB or 2GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_layers(text: str) -> tuple[int, ...]:
    """ "0,1,-1" -> (0, 1, -1)"""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(
            f"{text!r} is not a list of layers; write whole numbers like 0,1,-1"
        ) from None
