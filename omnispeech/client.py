"""Asks a server one question from the terminal, and what every command that talks needs."""

import base64
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx

from omnispeech.audio.io import encode_wav
from omnispeech.errors import OmniSpeechError

DEFAULT_SERVER = "http://127.0.0.1:8000"
KEY_VARIABLE = "OMNISPEECH_API_KEY"
ASK_FOR_KEY = f"; set {KEY_VARIABLE} to a key of this server"
# A healthy reply may take long: only the connection itself is waited for with a limit.
TIMEOUT = httpx.Timeout(None, connect=10.0)


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


@contextmanager
def posted(server: str, path: str, **request: Any) -> Iterator[httpx.Response]:
    """A streaming POST; whatever goes wrong is a ServerError of one line."""
    url = with_scheme(server) + path
    try:
        with httpx.stream(
            "POST",
            url,
            headers=credentials(),
            timeout=TIMEOUT,
            trust_env=not is_loopback(url),
            **request,
        ) as response:
            if response.is_error:
                response.read()
                advice = ASK_FOR_KEY if response.status_code == HTTPStatus.UNAUTHORIZED else ""
                why = f"{_why(response)}{advice}"
                raise ServerError(f"the server refused ({response.status_code}): {why}")
            yield response
    except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
        raise no_server(server, exc) from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise ServerError(f"{url}: the connection failed: {exc}") from exc


def with_scheme(server: str) -> str:
    return (server if "://" in server else f"http://{server}").rstrip("/")


def no_server(server: str, exc: Exception) -> ServerError:
    why = str(exc) or "nothing came within the time limit"
    return ServerError(
        f"no server answers at {server} ({why}); "
        "start one with: python model_worker.py --models DIR"
    )


def credentials() -> dict[str, str]:
    """The key comes from the environment: on a command line others of this machine could read it.
    Of several, as a server takes them, the first."""
    key = os.environ.get(KEY_VARIABLE, "").partition(",")[0].strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


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


def read_sound(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except FileNotFoundError as exc:
        raise ClientError(f"{path} does not exist; name a sound file") from exc
    except IsADirectoryError as exc:
        raise ClientError(f"{path} is a folder; name a sound file") from exc


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def complain(exc: Exception) -> int:
    sys.stderr.write(f"omnispeech: {exc}\n")
    return 1
