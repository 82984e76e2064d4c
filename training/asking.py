"""Asks a running server over HTTP, in the three ways that people do."""

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from omnispeech.audio.encoders import RATE_HZ as OPENAI_HZ
from omnispeech.client import Sampling, ask, posted
from omnispeech.errors import OmniSpeechError
from omnispeech.once import free_port

READY_S = 240.0
PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    samples: NDArray[np.float32]  # [N] in [-1, 1]
    rate_hz: int
    total_s: float  # until the last of it had come

    @property
    def real_time(self) -> float | None:
        """0.5: made twice as fast as it is heard. None for a reply without sound."""
        return self.total_s * self.rate_hz / len(self.samples) if len(self.samples) else None


@contextlib.contextmanager
def server(models: Path, threads: int, log: Path) -> Iterator[str]:
    """The address of one with default settings, on a copy: it writes beside what it loads.

    threads: and as many processor cores, where the system can hold it to them.
    """
    with TemporaryDirectory() as directory, log.open("wb") as told:
        shutil.copytree(models, directory, dirs_exist_ok=True)
        port = free_port()
        default = {k: v for k, v in os.environ.items() if not k.startswith("OMNISPEECH_")}
        start = "from omnispeech.cli import main; raise SystemExit(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", start, "serve", "--models", directory, "--port", str(port)],
            env=default | {"OMP_NUM_THREADS": str(threads)},
            stdout=told,
            stderr=told,
        )
        try:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(process.pid, sorted(os.sched_getaffinity(0))[:threads])
            address = f"http://127.0.0.1:{port}"
            _wait(process, address, log)
            yield address
        finally:
            process.terminate()
            process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/ready", trust_env=False).is_success:
                return
        time.sleep(PAUSE_S)
    raise OmniSpeechError(f"the server of the report did not become ready; {log} says why")


def speak_to(sound: bytes, address: str, seed: int) -> Reply:
    """A sound file -> its answer, streamed by /v1/speech"""
    with contextlib.redirect_stdout(io.StringIO()):
        answer = ask(sound, address, Sampling(seed=seed))
    return Reply(answer.text, as_samples(answer.pcm), answer.rate_hz, answer.total_s)


def chat(messages: list[dict[str, Any]], address: str, seed: int) -> Reply:
    """The answer to the last of the messages, streamed by /v1/chat/completions"""
    body = {
        "messages": messages,
        "modalities": ["text", "audio"],
        "audio": {"voice": "default", "format": "pcm16"},
        "stream": True,
        "seed": seed,
    }
    began, text, pcm = time.monotonic(), "", b""
    with posted(address, "/v1/chat/completions", json=body) as response:
        for audio in _audio_of(response.iter_lines()):
            text += audio.get("transcript", "")
            pcm += base64.b64decode(audio.get("data", ""))
    return Reply(text, as_samples(pcm), OPENAI_HZ, time.monotonic() - began)


def _audio_of(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    for line in lines:
        data = line.removeprefix("data: ")
        if data and data != "[DONE]":
            chunk = json.loads(data)
            if "error" in chunk:
                raise OmniSpeechError(chunk["error"]["message"])
            yield from (choice["delta"].get("audio") or {} for choice in chunk["choices"])


def read_aloud(text: str, address: str, seed: int) -> Reply:
    """By /v1/audio/speech"""
    began = time.monotonic()
    body = {"input": text, "response_format": "pcm", "seed": seed}
    with posted(address, "/v1/audio/speech", json=body) as response:
        pcm = response.read()
    return Reply(text, as_samples(pcm), OPENAI_HZ, time.monotonic() - began)


def as_samples(pcm: bytes) -> NDArray[np.float32]:
    """16 bit, little endian"""
    return np.frombuffer(pcm, "<i2").astype(np.float32) / np.float32(32768)
