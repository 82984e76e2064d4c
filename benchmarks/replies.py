"""bench.py replies: first audio, real-time factor, tokens per second, gaps between blocks.

    python bench.py replies         a random checkpoint, large enough for its arithmetic to count
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware import hardware
from omnispeech.assembly import choose_device, choose_dtype, load_models
from omnispeech.audio.io import decode_audio
from omnispeech.config import EngineConfig
from omnispeech.engine.events import Audio, AudioDelta, Done, Message, TurnRequest
from omnispeech.engine.playback import Playback
from omnispeech.engine.worker import Worker
from omnispeech.tiny.decoder import DecoderShape
from omnispeech.tiny.directory import write_tiny
from omnispeech.tiny.shape import LanguageShape, TinyShape

QUESTION = Path(__file__).parent.parent / "examples" / "question.wav"

SHAPES = {
    "tiny": TinyShape(),
    "small": TinyShape(
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
    arrivals_s: list[float] = field(default_factory=list)  # of each block of sound
    silence_s: float = 0.0  # in which the listener had nothing left to hear

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


async def measure(worker: Worker, request: TurnRequest) -> Measured:
    playback, arrivals, silence = Playback(), [], 0.0
    began = time.perf_counter()
    async for event in worker.answer(request):
        now = time.perf_counter() - began
        if isinstance(event, AudioDelta):
            silence += max(0.0, -(playback.ahead_s(now) or 0.0))
            playback.sent(len(event.pcm) / 2 / worker.sample_rate_hz, now)
            arrivals.append(now)
        elif isinstance(event, Done):
            return Measured(event, arrivals, silence)
    raise AssertionError("a reply ended without Done")


async def round_of(worker: Worker, conversations: int, args: argparse.Namespace) -> list[Measured]:
    sound = decode_audio(args.question.read_bytes(), max_seconds=120.0)
    message = Message("user", (Audio(sound),))
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
        f"parameters in {str(dtype).removeprefix('torch.')}; medians of {args.rounds} rounds."
    )
    worker.close()
    sys.stdout.write(table(caption, rows) + "\n")
    result = {"caption": caption, "phases_s": status.phases, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench.py replies", description="Measures replies.")
    parser.add_argument("--models", type=Path, help="default: a random checkpoint of --shape")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--conversations", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--question", type=Path, default=QUESTION)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if args.models is None:
            write_tiny(Path(folder), shape=SHAPES[args.shape])
        asyncio.run(bench(args, args.models or Path(folder)))
