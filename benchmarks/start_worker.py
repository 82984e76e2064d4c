"""One load in a process of its own: python -m benchmarks.start_worker WAY MODELS

Prints one line of JSON: seconds without the imports, bytes read, and peak memory.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.start_models import AWQ, OPENS2S, PLAIN
from omnispeech.checkpoint.opens2s import Loading, load_opens2s
from omnispeech.checkpoint.quantized import load_causal_lm
from omnispeech.checkpoint.reader import Request, read_tensors
from omnispeech.checkpoint.shards import weight_files
from omnispeech.checkpoint.tensor_file import TensorFile
from omnispeech.phases import peak_memory

CPU, DTYPE = torch.device("cpu"), torch.bfloat16


def plain(models: Path) -> nn.Module:
    return load_causal_lm(models / PLAIN, CPU, DTYPE)


class NothingSent:
    """The buffers of a GPU without the GPU: what is read is not copied on."""

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def allocated(self) -> None: ...

    def send(self, target: Tensor, source: Tensor) -> Any: ...

    def wait(self, sent: Any) -> None: ...

    def arrive(self, sent: Any) -> None: ...

    def arrive_all(self) -> None: ...


def through_buffers(models: Path) -> nn.Module:
    files = [TensorFile(path) for path in weight_files(models / PLAIN)]
    requests = [
        Request(file, name, entry.dtype)
        for file in files
        for name, entry in sorted(file.entries.items(), key=lambda item: item[1].start)
    ]
    for _ in read_tensors(requests, torch.device("meta"), transfers=NothingSent()):
        pass
    return nn.Module()


def transformers(models: Path) -> nn.Module:
    """Its tensors may still be in the file when it returns: they are brought into memory."""
    model = _qwen3().from_pretrained(models / PLAIN, dtype=DTYPE)
    for parameter in model.parameters():
        parameter.data.view(-1)[::2048].sum()
    return model


def _qwen3():  # type: ignore[no-untyped-def]
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM


def quantized(models: Path, *, prepare: bool) -> nn.Module:
    loading = Loading(prepare=prepare)
    return load_opens2s(models / OPENS2S, CPU, DTYPE, llm=models / AWQ, loading=loading).model


def original_order(models: Path) -> nn.Module:
    """All in bfloat16 first, then the quantized LLM in place of the other."""
    model = load_opens2s(models / OPENS2S, CPU, DTYPE).model
    model.llm_model = load_causal_lm(models / AWQ, CPU, DTYPE)
    return model


WAYS: dict[str, Callable[[Path], nn.Module]] = {
    "plain": plain,
    "through buffers": through_buffers,
    "transformers": transformers,
    "repacked": lambda models: quantized(models, prepare=False),
    "prepared": lambda models: quantized(models, prepare=True),
    "original order": original_order,
}


def main() -> None:
    way, models = sys.argv[1], Path(sys.argv[2])
    if way == "transformers":
        _qwen3()
    before, began = peak_memory(), time.perf_counter()
    model = WAYS[way](models)
    seconds = time.perf_counter() - began
    result = {"seconds": seconds, "peak_bytes": peak_memory(), "imports_bytes": before}
    del model
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
