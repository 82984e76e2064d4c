import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from fake_engine import DONE, RATE_HZ, FakeEngine, serving, sound, sound_file, tone

from omnispeech.client import Sampling, chat, default_server, objects, say, server_sent
from omnispeech.engine.events import Audio, Text, TextDelta
from omnispeech.errors import GenerationError, Overloaded

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def without_sound_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def question(tmp_path: Path) -> Path:
    path = tmp_path / "question.wav"
    path.write_bytes(sound_file(tone(0.2)))
    return path


def typing(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """What the person types; after the last line the input ends."""
    rest = iter(lines)

    def typed(prompt: str) -> str:
        line = next(rest, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)


def test_say_shows_the_text_and_timings_and_writes_the_reply(
    question: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(FakeEngine()) as url:
        assert say(question, Path("reply.wav"), url) == 0
    samples, rate_hz = soundfile.read("reply.wav", dtype="int16")
    assert (rate_hz, samples.tolist()) == (RATE_HZ, list(range(800)))
    text, report = capsys.readouterr().out.splitlines()
    assert text == "Hello"
    assert report.startswith("reply.wav: first audio after 0.")
    assert ", 0.04 s of sound in " in report and "real-time factor" in report


def test_say_sends_only_the_sampling_values_that_were_given(question: Path) -> None:
    engine = FakeEngine()
    with serving(engine) as url:
        say(question, Path("reply.wav"), url, sampling=Sampling(seed=4, temperature=0.0))
    got = engine.requests[0]
    assert (got.seed, got.temperature, got.top_p, got.max_new_tokens) == (4, 0.0, 1.0, 256)


def test_the_text_is_shown_while_it_comes(question: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        gate.set()  # the engine goes on only when its first text was seen

    monkeypatch.setattr("omnispeech.client.show", show)
    with serving(FakeEngine(TextDelta("Hel"), gate, sound(9), DONE)) as url:
        assert say(question, Path("reply.wav"), url) == 0
    assert shown[0] == "Hel"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Overloaded("8 are talking"), "the server refused (503): 8 are talking"),
        (GenerationError("the device failed"), "the server refused (500): the device failed"),
    ],
)
def test_a_refusal_is_one_line_and_status_1(
    question: Path, error: Exception, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(FakeEngine(error)) as url:
        assert say(question, Path("reply.wav"), url) == 1
    assert capsys.readouterr().err == f"omnispeech: {message}\n"
    assert not Path("reply.wav").exists()


def test_an_error_in_mid_reply_is_one_line_and_no_file(
    question: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(FakeEngine(sound(9), GenerationError("the device failed"))) as url:
        assert say(question, Path("reply.wav"), url) == 1
    assert capsys.readouterr().err == "omnispeech: the device failed\n"
    assert not Path("reply.wav").exists()


def test_a_reply_without_sound_is_told(question: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeEngine(TextDelta("hm"), DONE)) as url:
        assert say(question, Path("reply.wav"), url) == 1
    assert "the reply has no sound; reply.wav is not written" in capsys.readouterr().err


def test_no_server_is_one_line_that_says_how_to_start_one(
    question: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(question, Path("reply.wav"), NOWHERE) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"omnispeech: no server answers at {NOWHERE}")
    assert "model_worker.py --models" in line


@pytest.mark.parametrize("server", ["localhost:8000", "http://[", "ftp://x"])
def test_a_wrong_address_is_one_line(
    question: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(question, Path("reply.wav"), server) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_missing_question_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert say(Path("none.wav"), Path("reply.wav"), NOWHERE) == 1
    assert "none.wav" in capsys.readouterr().err


def test_an_address_without_a_scheme_is_http(question: Path) -> None:
    with serving(FakeEngine()) as url:
        assert say(question, Path("reply.wav"), url.removeprefix("http://")) == 0


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("none/reply.wav", "the folder none does not exist; make it, or give -o another"),
        ("reply.mp3", "reply.mp3: the reply is a WAV file; give -o a name that ends in .wav"),
    ],
)
def test_a_reply_that_cannot_be_written_is_told_before_the_server_is_asked(
    question: Path, reply: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine()
    with serving(engine) as url:
        assert say(question, Path(reply), url) == 1
    assert capsys.readouterr().err == f"omnispeech: {message}\n"
    assert engine.requests == []


def test_chat_tells_a_missing_file_and_an_empty_line_plainly_and_goes_on(
    question: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typing(monkeypatch, "", "none.wav", ".", str(question), "quit")
    engine = FakeEngine()
    with serving(engine) as url:
        assert chat(url) == 1
    assert len(engine.requests) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "omnispeech: none.wav does not exist; name a sound file",
        "omnispeech: . is a folder; name a sound file",
    ]
    assert "type the name of a sound file, or quit" in shown.out


def test_the_server_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMNISPEECH_SERVER", raising=False)
    assert default_server() == "http://127.0.0.1:8000"
    monkeypatch.setenv("OMNISPEECH_SERVER", "http://elsewhere:1")
    assert default_server() == "http://elsewhere:1"


def test_chat_keeps_the_history_of_both_sides(question: Path) -> None:
    engine = FakeEngine()
    with serving(engine) as url:
        assert chat(url, [question, question]) == 0
    first, second = (request.messages for request in engine.requests)
    assert [message.role for message in first] == ["user"]
    assert [message.role for message in second] == ["user", "assistant", "user"]
    assert second[1].content == (Text("Hello"),)
    assert all(isinstance(second[n].content[0], Audio) for n in (0, 2))


def test_chat_writes_numbered_replies_where_nothing_can_play_them(question: Path) -> None:
    with serving(FakeEngine()) as url:
        chat(url + "/", [question, question])
    for number in (1, 2):
        samples, rate_hz = soundfile.read(f"reply-{number}.wav", dtype="int16")
        assert (rate_hz, samples.tolist()) == (RATE_HZ, list(range(800)))


@pytest.mark.parametrize("last", [["quit"], []])
def test_chat_asks_for_files_until_quit_or_the_end_of_input(
    question: Path, last: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typing(monkeypatch, str(question), str(question), *last)
    engine = FakeEngine()
    with serving(engine) as url:
        assert chat(url) == 0
    assert len(engine.requests) == 2


def test_chat_goes_on_after_an_error_and_forgets_the_failed_turn(
    question: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine(TextDelta("a"), GenerationError("the device failed"))

    def mend(*_: object) -> int:
        engine.steps = (TextDelta("a"), DONE)
        return len(engine.requests)

    monkeypatch.setattr(sys.stderr, "write", mend)
    with serving(engine) as url:
        assert chat(url, [question, question]) == 1
    assert [len(request.messages) for request in engine.requests] == [1, 1]


def test_chat_without_a_server_is_status_1(
    question: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(NOWHERE, [question]) == 1
    assert "no server answers" in capsys.readouterr().err


def fake_sounddevice(played: list[bytes]) -> SimpleNamespace:
    """A microphone that hears a tone, and a loudspeaker that remembers."""

    class Stream:
        def __init__(self, callback: Callable[..., None] | None = None, **_: object) -> None:
            if callback:
                callback((tone(0.1) * 32767).astype("<i2").tobytes(), 1600, None, None)

        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *_: object) -> None: ...

        def write(self, pcm: bytes) -> None:
            played.append(pcm)

    return SimpleNamespace(
        query_devices=lambda kind: {"name": kind},
        PortAudioError=OSError,
        RawInputStream=Stream,
        RawOutputStream=Stream,
    )


def test_chat_records_and_plays_where_there_are_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[bytes] = []
    monkeypatch.setitem(sys.modules, "sounddevice", fake_sounddevice(played))
    typing(monkeypatch, "", "", "quit")
    engine = FakeEngine()
    with serving(engine) as url:
        assert chat(url) == 0
    assert b"".join(played) == sound(800).pcm
    assert len(engine.heard[0].content[0].samples) == 1600
    assert not Path("reply-1.wav").exists()


def test_a_machine_without_a_microphone_is_asked_for_files(
    question: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = fake_sounddevice([])

    def no_devices(kind: str) -> None:
        raise ValueError("no device")

    device.query_devices = no_devices
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    typing(monkeypatch, str(question), "quit")
    with serving(FakeEngine()) as url:
        assert chat(url) == 0
    assert Path("reply-1.wav").exists()


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_objects_are_found_however_the_stream_is_cut(size: int) -> None:
    wanted = [{"text": "a"}, {"text": "é\0"}, {}]
    stream = b"".join(json.dumps(item).encode() + b"\0" for item in wanted)
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert list(objects(pieces)) == wanted


def test_other_lines_of_an_event_stream_are_skipped() -> None:
    lines = [": keep-alive", "", "event: text", 'data: {"text": "a"}', ""]
    assert list(server_sent(lines)) == [("text", {"text": "a"})]


def test_an_answer_that_is_no_json_is_shown_as_it_is(
    question: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(502, text="bad gateway"))
    client = httpx.Client(transport=transport)

    def stream(*args: Any, trust_env: bool, **request: Any) -> Any:
        assert trust_env  # a proxy of the environment may be the way to another machine
        return client.stream(*args, **request)

    monkeypatch.setattr("omnispeech.client.httpx.stream", stream)
    assert say(question, Path("reply.wav"), "http://proxy") == 1
    assert capsys.readouterr().err == "omnispeech: the server refused (502): bad gateway\n"
    client.close()


@pytest.mark.parametrize("proxy", ["HTTP_PROXY", "ALL_PROXY"])
def test_proxies_are_not_asked_for_this_machine(
    question: Path, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    with serving(FakeEngine()) as url:
        assert say(question, Path("reply.wav"), url) == 0
        assert say(question, Path("reply.wav"), url.replace("127.0.0.1", "localhost")) == 0


def test_history_audio_is_the_file_as_it_was_read(question: Path) -> None:
    engine = FakeEngine()
    with serving(engine) as url:
        chat(url, [question])
    samples = engine.heard[0].content[0].samples
    np.testing.assert_allclose(samples, tone(0.2), atol=1e-4)
