"""Talks to a server from the terminal: one question in a file, or a whole conversation."""

import base64
import io
import json
import os
import sys
import time
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx

from omnispeech.audio.io import encode_wav
from omnispeech.errors import OmniSpeechError
from omnispeech.microphone import find_sounddevice, playing, record

DEFAULT_SERVER = "http://127.0.0.1:8000"
# A healthy reply may take long: only the connection itself is waited for with a limit.
TIMEOUT = httpx.Timeout(None, connect=10.0)

Play = Callable[[bytes, int], None]


class ClientError(OmniSpeechError):
    """The question or the place of the reply cannot be used: the server was not asked."""


class ServerError(OmniSpeechError):
    """What the server said, or why it could not be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """None: the server's default."""

    temperature: float | None = None
    top_p: float | None = None
    speech_temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None

    def given(self) -> dict[str, float | int]:
        return {name: value for name, value in asdict(self).items() if value is not None}


DEFAULT_SAMPLING = Sampling()


@dataclass(slots=True)
class Answer:
    """What has come of a reply; its text is shown as it comes."""

    text: str = ""
    pcm: bytes = b""
    rate_hz: int = 0
    first_audio_s: float = 0.0
    total_s: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def add_text(self, delta: str) -> None:
        self.text += delta
        show(delta)

    def add_audio(self, pcm: bytes, rate_hz: int) -> None:
        if not self.pcm:
            self.first_audio_s = time.monotonic() - self.started
        self.pcm, self.rate_hz = self.pcm + pcm, rate_hz

    def ended(self) -> "Answer":
        self.total_s = time.monotonic() - self.started
        show("\n")
        return self

    def report(self) -> str:
        if not self.pcm:
            return f"no sound came, {self.total_s:.2f} s in all"
        audio_s = len(self.pcm) / 2 / self.rate_hz
        return (
            f"first audio after {self.first_audio_s:.2f} s, {audio_s:.2f} s of sound in "
            f"{self.total_s:.2f} s, real-time factor {self.total_s / audio_s:.2f}"
        )


def default_server() -> str:
    return os.environ.get("OMNISPEECH_SERVER") or DEFAULT_SERVER


def say(question: Path, reply: Path, server: str, *, sampling: Sampling = DEFAULT_SAMPLING) -> int:
    """Sends a sound file, shows the text while it comes, writes the spoken reply."""
    try:
        check_reply(reply)
        answer = ask(read_sound(question), server, sampling)
        if not answer.pcm:
            raise ServerError(f"the reply has no sound; {reply} is not written")
        reply.write_bytes(encode_wav(answer.pcm, answer.rate_hz))
    except (OmniSpeechError, OSError) as exc:
        return complain(exc)
    show(f"{reply}: {answer.report()}\n")
    return 0


def check_reply(reply: Path) -> None:
    if reply.suffix.lower() != ".wav":
        raise ClientError(f"{reply}: the reply is a WAV file; give -o a name that ends in .wav")
    if not reply.parent.is_dir():
        raise ClientError(f"the folder {reply.parent} does not exist; make it, or give -o another")


def chat(server: str, files: Sequence[Path] = (), *, sampling: Sampling = DEFAULT_SAMPLING) -> int:
    """A conversation with its whole history. The questions are `files`; without any, the
    microphone or, where there is none, files that are asked for."""
    messages: list[dict[str, Any]] = []
    status = 0
    for number, question in enumerate(questions(files), 1):
        try:
            sound = {"audio": base64.b64encode(question()).decode()}
            asked = [*messages, {"role": "user", "content": [sound]}]
            answer = converse(asked, server, sampling, Path(f"reply-{number}.wav"))
        except (OmniSpeechError, OSError) as exc:
            status = complain(exc)
            continue
        messages = asked
        if answer.text:
            messages.append({"role": "assistant", "content": answer.text})
    return status


def questions(files: Sequence[Path]) -> Iterator[Callable[[], bytes]]:
    """Each gives the bytes of a sound file when it is called."""
    microphone = None if files else find_sounddevice("input")
    if files:
        yield from (partial(read_sound, path) for path in files)
    elif microphone:
        while typed("Enter starts the recording, quit ends: ") is not None:
            yield partial(record, microphone, lambda: typed("recording; Enter stops it "))
    else:
        while (path := typed("sound file, or quit: ")) is not None:
            if path:
                yield partial(read_sound, Path(path))
            else:
                show("type the name of a sound file, or quit\n")


def converse(
    messages: list[dict[str, Any]], server: str, sampling: Sampling, reply: Path
) -> Answer:
    """The reply is played, or written where nothing can play it."""
    if speaker := find_sounddevice("output"):
        with playing(speaker) as play:
            answer = generate(messages, server, sampling, play)
        show(answer.report() + "\n")
        return answer
    answer = generate(messages, server, sampling)
    if answer.pcm:
        reply.write_bytes(encode_wav(answer.pcm, answer.rate_hz))
    show(f"{reply}: {answer.report()}\n")
    return answer


def ask(sound: bytes, server: str, sampling: Sampling) -> Answer:
    """POST /v1/speech?format=events"""
    answer = Answer()
    query = {"format": "events", **sampling.given()}
    with posted(server, "/v1/speech", params=query, content=sound) as response:
        for name, data in server_sent(response.iter_lines()):
            if name == "text":
                answer.add_text(data["text"])
            elif name == "audio":
                answer.add_audio(base64.b64decode(data["audio"]), data["rate_hz"])
            elif name == "error":
                raise ServerError(data["message"])
            else:
                return answer.ended()
    raise ServerError("the reply broke off before its end")


def generate(
    messages: list[dict[str, Any]], server: str, sampling: Sampling, play: Play | None = None
) -> Answer:
    """POST /worker_generate_stream"""
    answer = Answer()
    body = {"messages": messages, **sampling.given()}
    with posted(server, "/worker_generate_stream", json=body) as response:
        for item in objects(response.iter_bytes()):
            if item["error_code"]:
                raise ServerError(item.get("reason", item["text"]))
            answer.add_text(item["text"][len(answer.text) :])
            if item["audio"]:
                pcm, rate_hz = unpacked(base64.b64decode(item["audio"]))
                answer.add_audio(pcm, rate_hz)
                if play:
                    play(pcm, rate_hz)
            if item["finalize"]:
                return answer.ended()
    raise ServerError("the reply broke off before its end")


@contextmanager
def posted(server: str, path: str, **request: Any) -> Iterator[httpx.Response]:
    """A streaming POST; whatever goes wrong is a ServerError of one line."""
    url = (server if "://" in server else f"http://{server}").rstrip("/") + path
    try:
        with httpx.stream(
            "POST", url, timeout=TIMEOUT, trust_env=not is_loopback(url), **request
        ) as response:
            if response.is_error:
                response.read()
                raise ServerError(f"the server refused ({response.status_code}): {_why(response)}")
            yield response
    except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
        raise ServerError(
            f"no server answers at {server} ({exc}); "
            "start one with: python model_worker.py --models DIR"
        ) from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise ServerError(f"{url}: the connection failed: {exc}") from exc


def is_loopback(url: str) -> bool:
    """Then no proxy of the environment is asked: those are for what is not on this machine."""
    host = httpx.URL(url).host
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _why(response: httpx.Response) -> str:
    try:
        body = json.loads(response.content.rstrip(b"\0"))
        return body["reason"] if "reason" in body else body["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def server_sent(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def objects(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """JSON objects, each followed by a NUL, in pieces of any length."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\0")
        yield from map(json.loads, whole)


def unpacked(wav: bytes) -> tuple[bytes, int]:
    with wave.open(io.BytesIO(wav)) as file:
        return file.readframes(file.getnframes()), file.getframerate()


def read_sound(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except FileNotFoundError as exc:
        raise ClientError(f"{path} does not exist; name a sound file") from exc
    except IsADirectoryError as exc:
        raise ClientError(f"{path} is a folder; name a sound file") from exc


def typed(prompt: str) -> str | None:
    """A line; None when the conversation is to end."""
    try:
        line = input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        show("\n")
        return None
    return None if line == "quit" else line


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def complain(exc: Exception) -> int:
    sys.stderr.write(f"omnispeech: {exc}\n")
    return 1
