"""bench.py replies: first audio, real-time factor, tokens per second, gaps between blocks.

    python bench.py replies                    the small model, and whether it answers right
    python bench.py replies --random large     random weights, enough for arithmetic to count
    python bench.py replies --models DIR --device cuda --conversations 1 8 32

All conversations of a round start together and ask the same spoken question.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware import hardware
from benchmarks.questions import ANSWER, QUESTION, read, small_model
from omnispeech.assembly import choose_device, choose_dtype, load_models
from omnispeech.config import EngineConfig
from omnispeech.engine.events import Audio, AudioDelta, Done, Message, TextDelta, TurnRequest
from omnispeech.engine.playback import Playback
from omnispeech.engine.worker import Worker
from omnispeech.tiny.decoder import DecoderShape
from omnispeech.tiny.directory import write_tiny
from omnispeech.tiny.shape import LanguageShape, TinyShape

SHAPES = {
    "tiny": TinyShape(),
    "large": TinyShape(
        encoder_width=512,
        encoder_inner=2048,
        encoder_layers=6,
        encoder_heads=8,
        adapter_inner=256,
        llm=LanguageShape(hidden=768, inner=2304, layers=16, heads=12, kv_heads=4, head_width=64),
        speech=LanguageShape(hidden=512, inner=1536, layers=8, heads=8, kv_heads=4, head_width=64),
        units=16384,
        decoder=DecoderShape(unit_width=128, encoder_width=256, encoder_inner=1024),
    ),
}


@dataclass(slots=True)
class Measured:
    """One reply, as its listener would have heard it."""

    done: Done
    text: str
    arrivals_s: list[float] = field(default_factory=list)  # of each block of sound
    silence_s: float = 0.0  # in which the listener had nothing left to hear

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


async def measure(worker: Worker, request: TurnRequest) -> Measured:
    playback, arrivals, silence, text = Playback(), [], 0.0, ""
    began = time.perf_counter()
    async for event in worker.answer(request):
        now = time.perf_counter() - began
        if isinstance(event, AudioDelta):
            silence += max(0.0, -(playback.ahead_s(now) or 0.0))
            playback.sent(len(event.pcm) / 2 / worker.sample_rate_hz, now)
            arrivals.append(now)
        elif isinstance(event, TextDelta):
            text += event.text
        elif isinstance(event, Done):
            return Measured(event, text, arrivals, silence)
    raise AssertionError("a reply ended without Done")


async def round_of(worker: Worker, conversations: int, args: argparse.Namespace) -> list[Measured]:
    message = Message("user", (Audio(read(args.question)),))
    # without a seed: blocks follow the measured speed, as for most callers
    request = TurnRequest(messages=(message,), max_new_tokens=args.max_new_tokens)
    return await asyncio.gather(*(measure(worker, request) for _ in range(conversations)))


def summary(conversations: int, rounds: Sequence[Sequence[Measured]]) -> dict[str, Any]:
    """Medians over all replies, and what the machine as a whole got done."""
    replies = [reply for one in rounds for reply in one]
    done = [reply.done for reply in replies]
    wall_s = sum(max(reply.done.total_s for reply in one) for one in rounds)
    gaps = [gap for reply in replies for gap in reply.gaps_s] or [0.0]
    return {
        "conversations": conversations,
        "replies": len(replies),
        "first_text_s": statistics.median(d.first_text_s for d in done),
        "first_audio_s": statistics.median(d.first_audio_s for d in done),
        "first_audio_s_worst": max(d.first_audio_s for d in done),
        "total_s": statistics.median(d.total_s for d in done),
        "audio_s": statistics.median(d.audio_s for d in done),
        "real_time_factor": statistics.median(d.real_time_factor for d in done),
        "text_tokens_per_s": sum(d.text_tokens for d in done) / wall_s,
        "units_per_s": sum(d.units for d in done) / wall_s,
        "block_gap_s": statistics.median(gaps),
        "block_gap_s_worst": max(gaps),
        "silence_s_worst": max(reply.silence_s for reply in replies),
        "right": sum(reply.text == ANSWER for reply in replies),
    }


COLUMNS = {
    "conversations": "conversations",
    "first_text_s": "first text (s)",
    "first_audio_s": "first audio (s)",
    "total_s": "whole reply (s)",
    "audio_s": "sound (s)",
    "real_time_factor": "real-time factor",
    "text_tokens_per_s": "text tokens/s, all",
    "units_per_s": "units/s, all",
    "block_gap_s": "gap between blocks (s)",
    "silence_s_worst": "worst silence (s)",
}


def table(caption: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [caption, "", "| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [f"{row[key]:.3g}" for key in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parameters(worker: Worker) -> int:
    decoder = worker.conversations.speech_decoder
    modules = (worker.conversations.models.lm, decoder.flow, decoder.hift)
    return sum(p.numel() for module in modules for p in module.parameters())


async def bench(args: argparse.Namespace, models: Path) -> None:
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    most = max(args.conversations)
    config = EngineConfig(
        max_conversations=most, kv_tokens=max(8192, 2048 * most), reuse_prefixes=False
    )
    worker = Worker(partial(load_models, models, device, dtype), config)
    worker.start()
    while not (status := worker.status()).ready:
        if status.failure:
            raise SystemExit(f"bench.py: {status.failure}")
        await asyncio.sleep(0.05)
    await round_of(worker, 1, args)
    rows = []
    for conversations in args.conversations:
        rounds = [await round_of(worker, conversations, args) for _ in range(args.rounds)]
        rows.append(summary(conversations, rounds))
    caption = (
        f"{hardware(device)}; torch {torch.__version__}; {parameters(worker) / 1e6:.0f} M "
        f"parameters in {str(dtype).removeprefix('torch.')}, {weights(args)}; "
        f"medians of {args.rounds} rounds{rightness(rows) if knows_answer(args) else ''}."
    )
    worker.close()
    sys.stdout.write(table(caption, rows) + "\n")
    result = {"caption": caption, "phases_s": status.phases, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def weights(args: argparse.Namespace) -> str:
    if args.random:
        return "random weights"
    return f"of {args.models}" if args.models else "the small model"


def knows_answer(args: argparse.Namespace) -> bool:
    return not (args.models or args.random) and args.question == QUESTION


def rightness(rows: Sequence[dict[str, Any]]) -> str:
    right, replies = (sum(row[key] for row in rows) for key in ("right", "replies"))
    return f"; {right} of {replies} answers were right"


@contextmanager
def models_of(args: argparse.Namespace) -> Iterator[Path]:
    if args.models:
        yield args.models
    elif args.random:
        with tempfile.TemporaryDirectory() as folder:
            write_tiny(Path(folder), shape=SHAPES[args.random])
            yield Path(folder)
    else:
        with small_model() as models:
            yield models


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench.py replies", description="Measures replies.")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--models", type=Path, help="default: the small model")
    asked.add_argument("--random", choices=SHAPES, help="random weights, of such a shape")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--conversations", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--question", type=Path, default=QUESTION)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(arguments)
    with models_of(args) as models:
        asyncio.run(bench(args, models))
