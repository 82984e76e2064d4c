"""Text that every machine has: the sources of Python's standard library, as bytes.

A document goes to one part only, so nothing is judged on what it was trained or calibrated on.
"""

import sysconfig
import zlib
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Part = Literal["train", "calibration", "evaluation"]
PARTS: tuple[Part, ...] = ("calibration", "evaluation")
SHARE = 10  # one document in so many goes to each of PARTS, the rest is for training
VOCABULARY = 256  # bytes
LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data")


@cache
def text(part: Part) -> Tensor:
    """[T] int64: the documents of one part in the order of their names, each ended by a zero."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(str(p.relative_to(library)) for p in library.rglob("*.py"))
    chosen = [n for n in names if part_of(n) == part and not set(LEFT_OUT) & set(Path(n).parts)]
    whole = b"\0".join((library / name).read_bytes() for name in chosen)
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8).long()


def part_of(name: str) -> Part:
    number = zlib.crc32(name.encode()) % SHARE
    return PARTS[number] if number < len(PARTS) else "train"


def pieces(part: Part, count: int, length: int, seed: int) -> Tensor:
    """[count, length]: pieces from random places; the same seed gives the same pieces."""
    source = text(part)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(source) - length, (count, 1), generator=generator)
    return source[starts + torch.arange(length)]
