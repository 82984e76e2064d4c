"""bench.py talks: many people talk to one server at once, for minutes.

    python bench.py talks --talkers 20 --seconds 300

They speak all protocols, interrupt, lose their connections and come back. What must not happen ends
the run with status 1: an error, a reply that stalls, a row or talk that is left over, memory that
grows, too many wrong answers. The server is a process of its own, with the small model or that of
--models; with --server URL one that runs already is asked.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import torch

from benchmarks.hardware import hardware, say
from benchmarks.questions import first_questions, small_model
from benchmarks.talkers import Habits, Notes, RealtimeTalker, RequestTalker, Speech, WindowTalker

ROOT = Path(__file__).parent.parent
PROTOCOLS = (
    "hands-free",
    "manual",
    "chat",
    "hands-free",
    "speech",
    "manual",
    "read aloud",
    "hands-free",
    "ws/stream",
    "chat",
)
SETTLE_S = 5.0  # until everybody's row is given back
GROWTH = 1.10  # of the memory from the end of the first third to the end: more is a leak
RIGHT = 0.9  # of the answers of the small model, sampled
RIGHT_HELP = f"share of answers that must be right (the small model: {RIGHT:g}, others: 0)"
READY_S = 300.0


@contextmanager
def started(models: Path, flags: Sequence[str]) -> Iterator[str]:
    """A server on a free port; gives its address once it is ready."""
    command = [sys.executable, "model_worker.py", "--models", str(models), "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        url = next(m[0] for line in lines if (m := re.search(r"http://[\d.]+:\d+", line)))
        drain = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
        wait_until_ready(url)
        yield url
    finally:
        process.terminate()
        process.wait()
        drain.wait()


def wait_until_ready(url: str) -> None:
    end_s = time.monotonic() + READY_S
    while httpx.get(f"{url}/ready", trust_env=False).status_code != 200:
        if time.monotonic() > end_s:
            raise SystemExit(f"{url} was not ready within {READY_S:g} s")
        time.sleep(0.2)


def figures(url: str) -> dict[str, float]:
    """All samples of /metrics that are numbers, by name and labels."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines)
        if not name.startswith("#")
    }


async def person(number: int, url: str, notes: Notes, habits: Habits, until_s: float) -> None:
    """Speaks one protocol to the end; not all begin at the same moment."""
    protocol = PROTOCOLS[number % len(PROTOCOLS)]
    await habits.pause()
    if protocol in ("hands-free", "manual"):
        talking = RealtimeTalker(url, notes, habits)
        await talking.talk(until_s, hands_free=protocol == "hands-free")
    elif protocol == "ws/stream":
        await WindowTalker(url, notes, habits).talk(until_s)
    else:
        await RequestTalker(url, notes, habits).talk(until_s, protocol=protocol)


async def all_talk(
    url: str, talkers: int, seconds: float, pause_s: float
) -> tuple[Notes, list[float]]:
    """What they saw, and the server's memory every few seconds."""
    questions = [Speech.of(question) for question in first_questions()]
    notes, memory, until_s = Notes(), [], time.monotonic() + seconds
    people = [Habits(random.Random(number), pause_s, questions) for number in range(talkers)]
    talks = [
        asyncio.create_task(guarded(person(number, url, notes, habits, until_s), number, notes))
        for number, habits in enumerate(people)
    ]
    while any(not talk.done() for talk in talks):
        await asyncio.wait(talks, timeout=seconds / 60)
        now = await asyncio.to_thread(figures, url)
        memory.append(now["process_resident_memory_bytes"])
        say(f"{sum(notes.turns.values())} turns, {memory[-1] / 1e6:.0f} MB, wrong: {notes.wrong}")
    return notes, memory


async def guarded(talk: Coroutine[Any, Any, None], number: int, notes: Notes) -> None:
    try:
        await talk
    except Exception as exc:
        notes.wrong.append(f"talker {number}, {PROTOCOLS[number % len(PROTOCOLS)]}: {exc!r}")


def left_over(url: str) -> list[str]:
    """What should be zero when everybody has left."""
    time.sleep(SETTLE_S)
    now = figures(url)
    names = [n for n in now if n.startswith(("omnispeech_conversations{", "omnispeech_talks{"))]
    bad = [f"{name} is {now[name]:g} at the end" for name in names if now[name]]
    failed = now['omnispeech_replies_total{outcome="failed"}']
    return bad + ([f"{failed:g} replies failed"] if failed else [])


def check(notes: Notes, early: float, late: float, least_right: float) -> None:
    """Adds to `notes.wrong` what only the whole run shows."""
    if late > early * GROWTH:
        notes.wrong.append(f"memory grew from {early / 1e6:.0f} to {late / 1e6:.0f} MB")
    answers = [one for each in notes.right.values() for one in each]
    if sum(answers) < least_right * len(answers):
        notes.wrong.append(f"{sum(answers)} of {len(answers)} answers were right")


def report(notes: Notes, early: float, late: float, seconds: float) -> dict[str, Any]:
    first_ms = [1000 * s for s in notes.first_audio_s]
    return {
        "hardware": hardware(torch.device("cpu")),
        "seconds": seconds,
        "turns": notes.turns,
        "right answers": {
            protocol: f"{sum(right)} of {len(right)}" for protocol, right in notes.right.items()
        },
        "mistakes, the first ten": notes.mistakes[:10],
        "interrupted": notes.interrupted,
        "connections lost and resumed": [notes.lost, notes.resumed],
        "first audio ms, median and 95 %": [
            round(median(first_ms)),
            round(quantiles(first_ms, n=20)[-1]),
        ],
        "whole replies": len(notes.dry_s),
        "of these without a gap over 50 ms": sum(s <= 0.05 for s in notes.dry_s),
        "stalled for over 2 s": notes.stalled,
        "longest gap s": round(notes.longest_gap_s, 3),
        "server memory MB after a third, at the end": [round(early / 1e6), round(late / 1e6)],
        "wrong": notes.wrong,
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench.py talks", description=__doc__)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--models", type=Path, help="to start a server with; default: the small model"
    )
    asked.add_argument("--server", metavar="URL", help="one that runs already, used by nobody else")
    parser.add_argument("--talkers", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--pause", type=float, default=8.0, help="seconds between two turns of one")
    parser.add_argument("--right", type=float, help=RIGHT_HELP)
    given, flags = parser.parse_known_args(arguments)
    if given.right is None:
        given.right = 0.0 if given.server or given.models else RIGHT
    if given.server:
        run(given.server, given)
        return
    with ExitStack() as stack:
        models = given.models or stack.enter_context(small_model())
        run(stack.enter_context(started(models, flags)), given)


def run(url: str, given: argparse.Namespace) -> None:
    notes, memory = asyncio.run(all_talk(url, given.talkers, given.seconds, given.pause))
    notes.wrong += left_over(url)
    early, late = memory[len(memory) // 3], memory[-1]
    check(notes, early, late, given.right)
    result = report(notes, early, late, given.seconds)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if notes.wrong or notes.stalled:
        raise SystemExit(1)
