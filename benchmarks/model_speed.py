"""bench.py model DIR: tokens per second of a plain or quantized language model directory."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hardware import hardware
from benchmarks.kernels import read_bandwidth
from omnispeech.assembly import choose_device, choose_dtype
from omnispeech.checkpoint.quantized import kernels_of, load_causal_lm
from omnispeech.models.qwen3 import CausalLM


@torch.inference_mode()
def measure(model: CausalLM, *, prompt: int, tokens: int, device: torch.device) -> dict[str, float]:
    """Seconds of reading a prompt at once, and of writing token by token, one conversation."""
    cache = model.new_cache(prompt + tokens + 2)
    row = cache.allocate(prompt + tokens + 1)
    assert row is not None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (prompt,), generator=generator).to(device)
    began = _now(device)
    states = model(model.embed(ids), cache, cache.layout([(row, prompt)]))
    token = _next(model, states)
    prefilled = _now(device)
    for _ in range(tokens):
        token = _next(model, model(model.embed(token), cache, cache.layout([(row, 1)])))
    return {"prefill_s": prefilled - began, "decode_s": _now(device) - prefilled}


def _next(model: CausalLM, states: Tensor) -> Tensor:
    return model.lm_head(states[-1:]).argmax(-1)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def bytes_per_token(model: CausalLM) -> int:
    """Every weight is read once for each token, but of the embedding one row."""
    everything = [*model.parameters(), *model.buffers()]
    return sum(t.nbytes for t in everything) - model.model.embed_tokens.weight.nbytes


def bandwidth_of(device: torch.device) -> float:
    """Bytes per second this device reads; of a GPU measured by copying, which reads and writes."""
    if device.type != "cuda":
        return read_bandwidth()
    block = torch.ones(1 << 28, device=device)
    target = torch.empty_like(block)
    times = []
    for _ in range(10):
        began = _now(device)
        target.copy_(block)
        times.append(_now(device) - began)
    return 2 * block.nbytes / min(times)


def bench(args: argparse.Namespace) -> dict[str, Any]:
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    began = _now(device)
    model = load_causal_lm(args.directory, device, dtype, args.kernel)
    loaded_s = _now(device) - began
    measure(model, prompt=args.prompt, tokens=2, device=device)  # first calls pack and allocate
    rounds = [
        measure(model, prompt=args.prompt, tokens=args.tokens, device=device)
        for _ in range(args.rounds)
    ]
    prefill, decode = (min(r[k] for r in rounds) for k in ("prefill_s", "decode_s"))
    read, bandwidth = bytes_per_token(model), bandwidth_of(device)
    return {
        "directory": str(args.directory),
        "hardware": hardware(device),
        "kernels": kernels_of(model) or str(dtype),
        "load_s": loaded_s,
        "prefill_tokens_per_s": args.prompt / prefill,
        "decode_tokens_per_s": args.tokens / decode,
        "bytes_per_token": read,
        "bandwidth": bandwidth,
        "of_bandwidth_limit": read * args.tokens / decode / bandwidth,
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench.py model", description=__doc__)
    parser.add_argument("directory", type=Path, help="of a text model, plain or quantized")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--prompt", type=int, default=512, help="tokens read at once")
    parser.add_argument("--tokens", type=int, default=64, help="written one by one")
    parser.add_argument("--rounds", type=int, default=3, help="the best counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(arguments)
    result = bench(args)
    sys.stdout.write("".join(f"{key}: {_shown(value)}\n" for key, value in result.items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
