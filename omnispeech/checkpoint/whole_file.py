"""What is known of files without reading a tensor; nothing here needs torch."""

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(target: Path, write: Callable[[Path], None]) -> None:
    """`target` appears whole or not at all: written beside, synced, renamed."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        write(partial)
        sync(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """A file, or the names in a directory, survive a power cut from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_text(size: int) -> str:
    """Of bytes: 1_500_000_000 -> 1.50 GB, 3_400_000 -> 3.4 MB, 51_200 -> 51.2 kB"""
    if size >= 10**8:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 10**6 else f"{size / 1e3:.1f} kB"
