"""A real browser without a head on the page, and what goes over its WebSocket."""

import importlib.util
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile

QUESTION = Path(__file__).parent.parent / "examples" / "question.wav"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NEITHER_TRAFFIC_NOR_SURPRISES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-features=MediaRouter,OptimizationHints,Translate,AutofillServerCommunication",
    "--disable-sync",
    "--no-first-run",
    "--no-pings",
    "--host-resolver-rules=MAP vm.test 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--autoplay-policy=no-user-gesture-required",
)
LIMIT_MS = 15_000
EXPECTED = "WebSocket connection", "ScriptProcessorNode is deprecated"  # in its console

Event = dict[str, Any]


def missing() -> str:
    """Why there is no browser to test with; empty if there is one."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: pip install playwright"
    return "" if CHROMIUM else "chromium is not installed: apt install chromium"


needs_browser = pytest.mark.skipif(bool(missing()), reason=missing())


def write_microphone(path: Path, before_s: float = 0.5, after_s: float = 1.8) -> Path:
    """A question between silences; Chromium plays it again and again."""
    question, rate_hz = soundfile.read(QUESTION)
    parts = np.zeros(int(before_s * rate_hz)), question, np.zeros(int(after_s * rate_hz))
    soundfile.write(path, np.concatenate(parts), rate_hz, subtype="PCM_16")
    return path


@dataclass(slots=True)
class Frame:
    at_s: float
    sent: bool
    event: Event

    @property
    def type(self) -> str:
        return self.event["type"]


@dataclass
class Visit:
    """One page in one browser."""

    page: Any
    frames: list[Frame] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # what the console complains of

    def start(self, mode: str = "push") -> None:
        if mode == "push":
            self.page.locator("input[value=push]").check(force=True)
        self.page.locator("#talk").click()

    def waits_for(self, state: str) -> None:
        self.page.wait_for_selector(f'body[data-state="{state}"]', timeout=LIMIT_MS)

    def says(self, seconds: float = 0.4) -> None:
        """With the space bar held."""
        self.page.locator("h1").click()
        self.page.keyboard.down(" ")
        self.waits_for("recording")
        self.page.wait_for_timeout(1000 * seconds)
        self.page.keyboard.up(" ")

    def types(self, text: str) -> None:
        """And sends it."""
        field = self.page.get_by_label("Type a question")
        field.press_sequentially(text)
        field.press("Enter")

    def typed(self) -> str:
        """What is in the field."""
        return self.page.get_by_label("Type a question").input_value()

    def until(self, kind: str, count: int = 1) -> Frame:
        """The frame of that type."""
        end = time.monotonic() + LIMIT_MS / 1000
        while len(found := self.of(kind)) < count:
            assert time.monotonic() < end, f"no {kind}: {[f.type for f in self.frames][-20:]}"
            self.page.wait_for_timeout(20)
        return found[count - 1]

    def of(self, kind: str) -> list[Frame]:
        return [frame for frame in self.frames if frame.type == kind]

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text(timeout=LIMIT_MS)

    def notice(self) -> str:
        """The kind of what is in the way."""
        place = self.page.locator(".notice")
        place.wait_for(timeout=LIMIT_MS)
        return place.get_attribute("data-kind")

    def waits_for_level(self, selector: str, test: str) -> None:
        """Of a meter, 0 to 1."""
        style = f"getComputedStyle(document.querySelector({selector!r}))"
        script = f"() => Number({style}.getPropertyValue('--level')) {test}"
        self.page.wait_for_function(script, timeout=LIMIT_MS)

    def figures(self) -> dict[str, float]:
        """Of the last turn: milliseconds, or as they are."""
        names = self.page.locator("#figures dt").all_inner_texts()
        values = self.page.locator("#figures dd").all_inner_texts()
        number = {value: re.match(r"[\d.]+", value) for value in values}
        return {
            name: float(found[0])
            for name, value in zip(names, values, strict=True)
            if (found := number[value])
        }

    def watch(self, connection: Any) -> None:
        def note(sent: bool) -> Any:
            return lambda text: self.frames.append(Frame(time.monotonic(), sent, json.loads(text)))

        connection.on("framesent", note(True))
        connection.on("framereceived", note(False))


class Browsers:
    """One with a microphone and one without, each begun when it is first needed."""

    def __init__(self, playwright: Any, microphone: Path) -> None:
        self._playwright = playwright
        self._begun: dict[bool, Any] = {}
        self._device = (
            "--use-fake-device-for-media-stream",
            f"--use-file-for-fake-audio-capture={microphone}",
        )

    @contextmanager
    def visiting(
        self, url: str, *, device: bool = True, allowed: bool = True, **context: Any
    ) -> Iterator[Visit]:
        """The page of a new visitor; afterwards its console must be clean.

        device: there is a microphone, which hears the question again and again.
        allowed: the visitor lets the page use it.
        """
        permissions = ["microphone"] if allowed else []
        visitor = self._browser(device).new_context(permissions=permissions, **context)
        try:
            visit = Visit(visitor.new_page())
            visit.page.on("websocket", visit.watch)
            visit.page.on("pageerror", lambda error: visit.problems.append(str(error)))
            visit.page.on("console", lambda message: _note(visit, message))
            visit.page.goto(url)
            yield visit
            assert not visit.problems, visit.problems
        finally:
            visitor.close()

    def _browser(self, device: bool) -> Any:
        if device not in self._begun:
            arguments = [*NEITHER_TRAFFIC_NOR_SURPRISES, *(self._device if device else ())]
            self._begun[device] = self._playwright.chromium.launch(
                executable_path=CHROMIUM, args=arguments
            )
        return self._begun[device]


@contextmanager
def browsers_hearing(microphone: Path) -> Iterator[Browsers]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield Browsers(playwright, microphone)


def _note(visit: Visit, message: Any) -> None:
    # Chromium itself writes a line for each connection that fails, and asks for the icon at any
    # time; the page is told of what matters to it. Without https there is no other way to play.
    expected = any(words in message.text for words in EXPECTED)
    expected |= "icon.svg" in message.location["url"]
    if message.type in ("error", "warning") and not expected:
        visit.problems.append(message.text)


class Line:
    """The way to a server, which can be cut: connections break, and new ones are refused."""

    def __init__(self, url: str) -> None:
        self._port = urlsplit(url).port
        self._door = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.open = True
        self._run(self._accept)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._door.getsockname()[1]}"

    def cut(self) -> None:
        self.open = False
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.open = True

    def close(self) -> None:
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join()
        for end in (self._door, *self._ends):
            end.close()

    def _run(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._door.accept()
                if not self.open:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._port))
                self._ends += [near, far]
                self._run(_carry, near, far)
                self._run(_carry, far, near)


def _carry(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def visiting_by_line(browsers: Browsers, server: str) -> Iterator[tuple[Line, Visit]]:
    """The page, and the line between it and its server."""
    with line_to(server) as line, browsers.visiting(line.url) as visit:
        yield line, visit


@contextmanager
def line_to(url: str) -> Iterator[Line]:
    line = Line(url)
    try:
        yield line
    finally:
        line.close()
