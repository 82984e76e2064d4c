"""From the first layer to the last: quantize, store, go on; less at once when memory is out."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.models.qwen3 import Block
from omnispeech.quantization.job import Job
from omnispeech.quantization.memory import MemoryMonitor, return_memory
from omnispeech.quantization.method import LayerResult
from omnispeech.quantization.progress import Progress
from omnispeech.quantization.report import layer_record, mean_loss
from omnispeech.quantization.run_settings import SHORTEST
from omnispeech.quantization.selection import LINEARS, layer_prefix
from omnispeech.quantization.state import Streams, WorkDirectory
from omnispeech.quantization.stored import (
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
    """Goes on where `work` ended; the states behind the last layer."""
    streams = work.streams()
    if streams is None:
        streams = job.first_streams()
        work.save_streams(streams)
    # whoever continues may ask for less at once, never for more than was found to fit
    streams = replace(streams, batch_tokens=min(streams.batch_tokens, job.settings.batch_tokens))
    progress.start(job.layers, streams.done)
    while streams.done < job.layers:
        monitor.lap()
        streams = _layer(job, work, streams, monitor, progress)
        return_memory()
    return streams


def _layer(
    job: Job, work: WorkDirectory, streams: Streams, monitor: MemoryMonitor, progress: Progress
) -> Streams:
    """Quantizes the next layer and stores it with the states behind it, which are returned."""
    index, prefix = streams.done, layer_prefix(streams.done)
    began = time.monotonic()
    result, following = _until_it_fits(job, work, streams, progress)
    tensors = stored_tensors(prefix, result.weights, result.plain, job.conversion.scheme)
    digests = layer_digests(prefix, result)
    record = layer_record(index, result, digests, time.monotonic() - began, monitor.lap())
    work.save_layer(index, tensors, record)
    if result.salient:
        work.save_salient(index, salient_tensors(prefix, result.salient))
    work.save_streams(following)
    progress.layer(following.done, mean_loss(record), monitor.total)
    return following


def _until_it_fits(
    job: Job, work: WorkDirectory, streams: Streams, progress: Progress
) -> tuple[LayerResult, Streams]:
    """One layer, again and again from its saved states, with less at once on the device."""
    while True:
        try:
            return _quantized(job, streams.done, streams)
        except torch.OutOfMemoryError as exc:
            room = smaller(streams.batch_tokens, streams.longest)
            if room is None:
                raise ConfigError(
                    f"the device is out of memory at layer {streams.done} even with sequences of "
                    f"{SHORTEST} tokens, one at a time; use a device with more memory or "
                    "--device cpu"
                ) from exc
        # outside of `except`, which keeps alive what the failed attempt has allocated
        return_memory()
        streams = divided(_saved(work), *room)
        progress.say(
            [
                f"layer {streams.done}: out of memory; again with {room[0]} tokens at once, "
                f"sequences of {streams.longest}"
            ]
        )


def _quantized(job: Job, index: int, streams: Streams) -> tuple[LayerResult, Streams]:
    """The float states go ahead through the layer before the method changes it."""
    block = job.source.block(index, job.device)
    ahead = job.stream(streams, streams.floats)
    with torch.no_grad():
        ahead.advance(block)
        result = _converted(job, index, block, streams)
        install(block, result.weights, result.plain)
        behind = job.stream(streams, streams.quantized)
        behind.advance(block)
    following = replace(
        streams, done=index + 1, floats=tuple(ahead.states), quantized=tuple(behind.states)
    )
    return result, following


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


def _saved(work: WorkDirectory) -> Streams:
    streams = work.streams()
    assert streams is not None, work.path
    return streams
