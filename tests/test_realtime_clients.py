"""Live conversations held by the realtime clients of others, unmodified.

Each runs in an environment of its own, named by a variable:
OMNISPEECH_TEST_LIVEKIT=/path/to/its/python
"""

import json
import os
import subprocess
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event as Signal
from typing import Any

import pytest
import soundfile
import soxr

from omnispeech.config import TalkConfig
from omnispeech.engine.events import (
    Audio,
    EngineStatus,
    Event,
    Message,
    Text,
    TextDelta,
    ToolCall,
    TurnRequest,
)
from tests.fake_engine import DONE as CUT
from tests.fake_engine import RATE_HZ, FakeEngine, Step, serving, sound

INTEROP = Path(__file__).parent / "interop"
QUESTION = Path(__file__).parent.parent / "examples" / "question.wav"
SPOKEN = ("Hello.", "One.", "Two.", "", "Three, and so on.", "Four.")
NEVER = Signal()
DONE = replace(CUT, speech_finish="stop")
STEPS = ("turn", "turn", "call", "interrupt")


@dataclass(frozen=True)
class Client:
    script: str
    variable: str
    needs: str  # pip install
    asks_for_transcripts: bool  # unless its user says no
    expected: tuple[str, ...] = ()  # in a line that it logs, whatever the server does
    environment: dict[str, str] = field(default_factory=dict)


CLIENTS = [
    Client(
        "realtime_livekit.py",
        "OMNISPEECH_TEST_LIVEKIT",
        "livekit-agents livekit-plugins-openai",
        asks_for_transcripts=True,
        expected=("audio output does not support pause",),
    ),
    Client(
        "realtime_pipecat.py",
        "OMNISPEECH_TEST_PIPECAT",
        "pipecat-ai[openai]",
        asks_for_transcripts=False,
    ),
    Client(
        "realtime_agents.py",
        "OMNISPEECH_TEST_AGENTS",
        "openai-agents",
        asks_for_transcripts=True,
        environment={"OPENAI_AGENTS_DISABLE_TRACING": "1"},
    ),
]


class Partner(FakeEngine):
    """What it says depends on how often the user has spoken."""

    async def answer(self, request: TurnRequest) -> AsyncGenerator[Event, None]:
        self.steps = said(request)
        async for event in super().answer(request):
            yield event


def said(request: TurnRequest) -> tuple[Step, ...]:
    if not request.speech:
        return (TextDelta("A question."), DONE)
    if request.messages[-1].role == "tool":
        return (TextDelta("It rains."), sound(RATE_HZ), DONE)
    turn = sum(isinstance(p, Audio) for message in request.messages for p in message.content)
    text = TextDelta(SPOKEN[turn])
    if turn == 3:
        return (ToolCall("weather", '{"city": "Bern"}'), DONE)
    if turn == 4:
        return (text, sound(4 * RATE_HZ), NEVER)
    return (text, sound(RATE_HZ), DONE)


@pytest.fixture(params=CLIENTS, ids=lambda client: Path(client.script).stem)
def client(request: pytest.FixtureRequest) -> Client:
    client: Client = request.param
    if client.variable not in os.environ:
        pytest.skip(
            f"{client.variable} does not name the python of an environment with {client.needs}"
        )
    return client


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples, rate_hz = soundfile.read(QUESTION, dtype="float32")
    path = tmp_path_factory.mktemp("question") / "question.wav"
    soundfile.write(path, soxr.resample(samples, rate_hz, 24_000), 24_000, subtype="PCM_16")
    return path


def held(client: Client, url: str, question: Path, *steps: str) -> dict[str, Any]:
    """What the client's script reports of its talk."""
    command = [os.environ[client.variable], str(INTEROP / client.script), url, str(question)]
    run = subprocess.run(
        [*command, *steps],
        env=os.environ | client.environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    report: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    report["logged"] = [
        line for line in report["logged"] if not any(known in line for known in client.expected)
    ]
    return report


def texts(messages: tuple[Message, ...]) -> list[str]:
    return [p.text for m in messages for p in m.content if isinstance(p, Text)]


def test_a_client_of_others_holds_a_whole_talk(client: Client, question: Path) -> None:
    engine = Partner()
    with serving(engine, TalkConfig(transcription="model")) as url:
        report = held(client, url, question, *STEPS)
    spoken = [answer for answer in report["answers"] if answer["sound"]]
    said = ["One.", "Two.", "It rains.", "Three, and so on."]
    assert [answer["text"] for answer in spoken[:4]] == said
    assert all(44_000 < answer["sound"] < 52_000 for answer in spoken[:3])  # bytes: one second
    assert report["calls"] == ["Bern"]
    assert engine.cancelled.wait(10)
    assert (report["errors"], report["logged"], report["closed"]) == ([], [], True)


def test_what_was_said_before_is_remembered(client: Client, question: Path) -> None:
    engine = Partner()
    with serving(engine) as url:
        held(client, url, question, "turn", "turn")
    roles = [message.role for message in engine.heard]
    assert roles[0] == "system"
    assert roles[-3:] == ["user", "assistant", "user"]
    assert texts(engine.heard)[-1] == "One."
    assert texts(engine.heard)[0] == "Answer."


def test_without_transcripts_it_is_told_so_once(client: Client, question: Path) -> None:
    with serving(Partner()) as url:
        report = held(client, url, question, "turn")
    assert report["answers"][0]["text"] == "One."
    assert len(report["errors"]) == client.asks_for_transcripts
    assert all("session.audio.input.transcription" in error for error in report["errors"])


def test_without_tools_it_hears_nothing_of_a_model_that_takes_none(
    client: Client, question: Path
) -> None:
    toolless = EngineStatus(ready=True, unsupported={"tools": "send none", "tool_calls": "none"})
    with serving(Partner(status=toolless), TalkConfig(transcription="model")) as url:
        report = held(client, url, question, "turn", "turn")
    assert [answer["text"] for answer in report["answers"]] == ["One.", "Two."]
    assert (report["errors"], report["logged"]) == ([], [])
