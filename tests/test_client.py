import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import soundfile
from access_keys import ALICE, BOB, key_file
from fake_engine import DONE, RATE_HZ, FakeEngine, serving, sound, sound_file, tone

from omnispeech.client import Sampling, default_server, say, server_sent
from omnispeech.config import AccessConfig
from omnispeech.engine.events import TextDelta
from omnispeech.errors import GenerationError, Overloaded

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def question(tmp_path: Path) -> Path:
    path = tmp_path / "question.wav"
    path.write_bytes(sound_file(tone(0.2)))
    return path


def test_say_brings_the_key_of_the_environment(
    question: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("OMNISPEECH_API_KEY", raising=False)
    access = AccessConfig(api_keys=str(key_file(tmp_path, alice=ALICE)))
    with serving(FakeEngine(), access=access) as url:
        assert say(question, Path("reply.wav"), url) == 1
        assert "refused (401): an API key is needed" in (told := capsys.readouterr().err)
        assert told.endswith("set OMNISPEECH_API_KEY to a key of this server\n")
        monkeypatch.setenv("OMNISPEECH_API_KEY", f"{ALICE},{BOB}")
        assert say(question, Path("reply.wav"), url) == 0


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


def test_the_server_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMNISPEECH_SERVER", raising=False)
    assert default_server() == "http://127.0.0.1:8000"
    monkeypatch.setenv("OMNISPEECH_SERVER", "http://elsewhere:1")
    assert default_server() == "http://elsewhere:1"


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
