"""From the first layer to the last: quantize, store, go on; less at once when memory is out."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.models.qwen3 import Block
from omnispeech.quantization.job import Job
from omnispeech.quantization.memory import MemoryMonitor, return_memory
from omnispeech.quantization.method import LayerResult
from omnispeech.quantization.output import write_text
from omnispeech.quantization.progress import Progress
from omnispeech.quantization.report import (
    LOG,
    layer_record,
    mean_loss,
    measured,
    progress_lines,
    run_facts,
    summary,
)
from omnispeech.quantization.run_settings import SHORTEST
from omnispeech.quantization.selection import LINEARS, layer_prefix
from omnispeech.quantization.state import Streams, WorkDirectory
from omnispeech.quantization.stored import (
    check_outside,
    install,
    salient_tensors,
    stored_tensors,
    tensor_digest,
    to_half,
    weight_digest,
)


def quantize_layers(
    job: Job, work: WorkDirectory, monitor: MemoryMonitor, progress: Progress
) -> Streams:
    """Goes on where `work` ended; the states behind the last layer.

    The log in `work` tells of every finished layer, and of the memory taken, however this ends.
    """
    return _LayerLoop(job, work, monitor, progress).run()


class _LayerLoop:
    def __init__(
        self, job: Job, work: WorkDirectory, monitor: MemoryMonitor, progress: Progress
    ) -> None:
        self.job, self.work, self.monitor, self.progress = job, work, monitor, progress
        streams = work.streams()
        if streams is None:
            check_outside(job.source)
            streams = job.first_streams()
            work.save_streams(streams)
        # whoever continues may ask for less at once, never for more than was found to fit
        tokens = min(streams.batch_tokens, job.settings.batch_tokens)
        self.streams = replace(streams, batch_tokens=tokens)  # in front of the next layer
        self.records = work.records(streams.done)

    def run(self) -> Streams:
        self.progress.start(self.job.layers, self.streams.done)
        self._log()
        try:
            while self.streams.done < self.job.layers:
                self.monitor.lap()
                self._layer()
                self._log()
                return_memory()
        except BaseException as exc:
            with suppress(OSError):  # of a full disk, say: what went wrong first is told
                self._log(str(exc) or type(exc).__name__)
            raise
        return self.streams

    def _layer(self) -> None:
        """Quantizes the next layer and stores it with the states behind it."""
        index, prefix = self.streams.done, layer_prefix(self.streams.done)
        began = time.monotonic()
        result, following = self._until_it_fits()
        tensors = stored_tensors(prefix, result.weights, result.plain, self.job.conversion.scheme)
        digests = layer_digests(prefix, result)
        record = layer_record(index, result, digests, time.monotonic() - began, self.monitor.lap())
        self.work.save_layer(index, tensors, record)
        if result.salient:
            self.work.save_salient(index, salient_tensors(prefix, result.salient))
        self.work.save_streams(following)
        self.streams = following
        self.records.append(record)
        self.progress.layer(following.done, mean_loss(record), self.monitor.total)

    def _until_it_fits(self) -> tuple[LayerResult, Streams]:
        """One layer, again and again from its saved states, with less at once on the device."""
        while True:
            try:
                return self._quantized()
            except torch.OutOfMemoryError as exc:
                room = smaller(self.streams.batch_tokens, self.streams.longest)
                if room is None:
                    raise ConfigError(
                        f"the device is out of memory at layer {self.streams.done} even with "
                        f"sequences of {SHORTEST} tokens, one at a time; use a device with more "
                        f"memory or --device cpu (memory of each layer: {self.work.path / LOG})"
                    ) from exc
            # outside of `except`, which keeps alive what the failed attempt has allocated
            return_memory()
            self.streams = divided(self._saved(), *room)
            self.progress.say(
                [
                    f"layer {self.streams.done}: out of memory; again with {room[0]} tokens at "
                    f"once, sequences of {self.streams.longest}"
                ]
            )

    def _quantized(self) -> tuple[LayerResult, Streams]:
        """The float states go ahead through the layer before the method changes it."""
        job, streams = self.job, self.streams
        block = job.source.block(streams.done, job.device)
        ahead = job.stream(streams, streams.floats)
        with torch.no_grad():
            ahead.advance(block)
            result = _converted(job, streams.done, block, streams)
            install(block, result.weights, result.plain)
            behind = job.stream(streams, streams.quantized)
            behind.advance(block)
        following = replace(
            streams,
            done=streams.done + 1,
            floats=tuple(ahead.states),
            quantized=tuple(behind.states),
        )
        return result, following

    def _saved(self) -> Streams:
        streams = self.work.streams()
        assert streams is not None, self.work.path
        return streams

    def _log(self, stopped: str = "") -> None:
        facts = run_facts(self.job, self.streams)
        data = facts | {
            "summary": summary(self.records),
            "layers": self.records,
            "measured": measured(self.records, self.monitor.total, self.job.calibration_peak),
        }
        done = f"not finished: {self.streams.done} of {self.job.layers} layers"
        write_text(
            self.work.path / LOG,
            "\n".join([f"{done}; {stopped}" if stopped else done, *progress_lines(data)]) + "\n",
        )


def _converted(job: Job, index: int, block: Block, streams: Streams) -> LayerResult:
    prefix = layer_prefix(index)
    if all(prefix + name in job.conversion.kept for name in LINEARS):
        result = LayerResult(weights={}, plain=dict(block.named_parameters()), linears={})
    else:
        floats = job.stream(streams, streams.floats)
        quantized = job.stream(streams, streams.quantized)
        kept = [name for name in LINEARS if prefix + name in job.conversion.kept]
        try:
            result = job.build(job.method).quantize(block, floats, quantized, kept)
        except CheckpointError as exc:  # a method knows no other layer
            raise CheckpointError(f"layer {index}: {exc}") from exc
    plain = {name: to_half(tensor, prefix + name) for name, tensor in result.plain.items()}
    return replace(result, plain=plain)


def layer_digests(prefix: str, result: LayerResult) -> dict[str, str]:
    """By module of quantized linears, by tensor of the others; `prefix` ends with a dot."""
    digests = {prefix + name: weight_digest(weight) for name, weight in result.weights.items()}
    return digests | {prefix + name: tensor_digest(t) for name, t in result.plain.items()}


def smaller(batch_tokens: int, longest: int) -> tuple[int, int] | None:
    """(tokens at once, longest sequence) to try next; None: nothing smaller is left.

    First fewer sequences go together; when one is alone already, it is cut in halves.
    """
    if batch_tokens > longest:
        return max(longest, batch_tokens // 2), longest
    if longest > SHORTEST:
        half = max(SHORTEST, -(-longest // 2))
        return half, half
    return None


def divided(streams: Streams, batch_tokens: int, longest: int) -> Streams:
    """No token is lost: sequences that are too long become several."""
    return replace(
        streams,
        batch_tokens=batch_tokens,
        counted=_cut(streams.counted, longest),
        floats=_cut(streams.floats, longest),
        quantized=_cut(streams.quantized, longest),
    )


def _cut(tensors: Sequence[Tensor], longest: int) -> tuple[Tensor, ...]:
    return tuple(part for tensor in tensors for part in torch.split(tensor, longest))
