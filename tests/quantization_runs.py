"""Runs of the quantization pipeline that a test can disturb, and what they leave."""

import errno
import io
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from language_model_files import METHOD, Rounding, calibration

from omnispeech.calibration.samples import Calibration
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.models.qwen3 import Block
from omnispeech.quantization.method import LayerResult
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.pipeline import run
from omnispeech.quantization.progress import Progress
from omnispeech.quantization.report import JSON, LOG, Report
from omnispeech.quantization.run_settings import RunSettings
from omnispeech.quantization.stream import Stream


def quantize(
    source: LanguageFiles,
    output: Path,
    *,
    method: MethodSettings = METHOD,
    build: Callable[[MethodSettings], Any] = Rounding,
    given: Calibration | None = None,
    **settings: Any,
) -> Report:
    report = run(
        source,
        given or calibration(source),
        method,
        RunSettings(**settings),
        output,
        progress=Progress(io.StringIO()),
        build=build,
    )
    assert report is not None
    return report


def contents(directory: Path) -> dict[str, Any]:
    """{file: bytes}, without what was measured: time and memory are never the same."""
    files: dict[str, Any] = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != LOG
    }
    report = json.loads(files[JSON])
    del report["measured"]
    return files | {JSON: report}


class Spy(Rounding):
    """Keeps the states that every layer was quantized on."""

    seen: list[tuple[list[torch.Tensor], list[torch.Tensor]]]

    def quantize(
        self, block: Block, floats: Stream, quantized: Stream, kept: Collection[str] = ()
    ) -> LayerResult:
        self.seen.append((list(floats.states), list(quantized.states)))
        return super().quantize(block, floats, quantized)


class OutOfMemory(Rounding):
    """Of a device that holds so many tokens of a call, and fails in some layers only."""

    room = 64
    layers: tuple[int, ...] = (0, 1, 2)
    calls: list[int]

    def quantize(
        self, block: Block, floats: Stream, quantized: Stream, kept: Collection[str] = ()
    ) -> LayerResult:
        index = len(set(self.calls))
        largest = max(len(batch.x) for batch in quantized.batches())
        if index in self.layers and largest > self.room:
            block.mlp.up_proj.weight.data.zero_()  # half done: nothing of it may be used again
            quantized.states[0].zero_()
            raise torch.OutOfMemoryError(f"{largest} tokens")
        self.calls.append(index)
        return super().quantize(block, floats, quantized)


def device(room: int, layers: tuple[int, ...] = (0, 1, 2)) -> type[OutOfMemory]:
    return type("Device", (OutOfMemory,), {"room": room, "layers": layers, "calls": []})


def crashing(method: Callable[..., None], count: int, before: bool) -> Callable[..., None]:
    calls = 0

    def crash(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if before and calls > count:
            raise KeyboardInterrupt
        method(*arguments, **options)
        if calls > count:
            raise KeyboardInterrupt

    return crash


def full_disk(write: Callable[..., None], count: int) -> Callable[..., None]:
    calls = 0

    def fail(path: Path, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > count:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *arguments)

    return fail


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
