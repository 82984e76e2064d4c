"""`startup.py --once`: a worker of its own answers the shipped question; then all ends."""

import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from omnispeech.checkpoint.whole_file import size_text
from omnispeech.client import Sampling, ServerError, ask, read_sound, show

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
LOOK_EVERY_S = 1.0
SAMPLING = Sampling(seed=1)  # two starts with one model can be compared
END_S = 40.0  # a worker that does not end within it is killed


def answer_once(command: Sequence[str], question: Path) -> int:
    """command: of the worker; its host and port are chosen here. Gives the exit status."""
    sound = read_sound(question)
    port = free_port()
    with running([*command, "--host", HOST, "--port", str(port)]) as process:
        server = f"http://{HOST}:{port}"
        began = time.monotonic()
        ready = wait_ready(process, server)
        show(f"ready after {time.monotonic() - began:.1f} s\n")
        show("".join(phase_line(name, phase) for name, phase in ready["phases"].items()))
        answer = ask(sound, server, SAMPLING)
        show(answer.report() + "\n")
        if not answer.pcm:
            raise ServerError("the reply has no sound")
    return 0


def free_port() -> int:
    with socket.create_server((HOST, 0)) as door:
        return int(door.getsockname()[1])


@contextmanager
def running(command: Sequence[str]) -> Iterator["subprocess.Popen[bytes]"]:
    """The process ends with the block, and with this one on SIGTERM and Ctrl-C."""
    early: list[int] = []  # a signal while the process is being made would leave it behind
    before = signal.signal(signal.SIGTERM, lambda number, _: early.append(number))
    process = subprocess.Popen(command)
    try:
        signal.signal(signal.SIGTERM, _end)
        for number in early:
            _end(number, None)
        yield process
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _close(process)
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _close(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_ready(process: "subprocess.Popen[bytes]", server: str) -> dict[str, Any]:
    """What /ready says; raises ServerError when the worker ends or fails before that."""
    while (status := process.poll()) is None:
        try:
            response = httpx.get(f"{server}/ready", timeout=5.0, trust_env=False)
        except httpx.TransportError:
            time.sleep(LOOK_EVERY_S)
            continue
        body: dict[str, Any] = response.json()
        if response.is_success:
            return body
        if body["status"] == "failed":
            raise ServerError(f"the worker failed: {body['error']['message']}")
        time.sleep(LOOK_EVERY_S)
    raise ServerError(f"the worker ended with status {status} before it was ready")


def phase_line(name: str, phase: dict[str, Any]) -> str:
    size = f", {size_text(phase['size'])}" if phase["size"] else ""
    return f"  {name}: {phase['seconds']:.1f} s{size}\n"
