"""`omnispeech chat`: files, a pipe and devices, each in a process of its own as people have it."""

import asyncio
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from access_keys import ALICE, key_file
from fake_engine import DONE, FakeEngine, serving, sound_file, tone
from page_browser import Line, line_to
from terminal_window import COMMAND, Window
from websockets.sync.client import connect

from omnispeech.cli import main
from omnispeech.config import AccessConfig, TalkConfig
from omnispeech.engine.events import Audio, AudioDelta, Text, TextDelta, TurnRequest
from omnispeech.errors import GenerationError

TESTS = Path(__file__).parent
QUESTION = TESTS.parent / "examples" / "question.wav"
RATE_HZ = FakeEngine().sample_rate_hz
NOWHERE = "http://127.0.0.1:9"
WHOLE = replace(DONE, speech_finish="stop")

needs_vad = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnxruntime", "silero_vad")),
    reason="onnxruntime or silero-vad is not installed",
)


def hum(seconds: float) -> AudioDelta:
    wave = 8000 * np.sin(2 * np.pi * 220 * np.arange(int(seconds * RATE_HZ)) / RATE_HZ)
    return AudioDelta(wave.astype("<i2").tobytes())


def speaker(*words: str, seconds: float = 0.2) -> FakeEngine:
    return FakeEngine(*(s for w in words for s in (TextDelta(f"{w} "), hum(seconds))), WHOLE)


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("OMNISPEECH_SERVER", "OMNISPEECH_API_KEY", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    Path("question.wav").write_bytes(sound_file(tone(0.3)))


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A microphone into which a question is spoken twice, and a loudspeaker."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS / "sound_devices"), prepend=os.pathsep)
    monkeypatch.setenv("MICROPHONE", "microphone.wav")
    monkeypatch.setenv("LOUDSPEAKER", "heard.raw")
    speak_twice("microphone.wav")


def speak_twice(path: str, rate_hz: int = 16_000) -> None:
    question, from_hz = soundfile.read(QUESTION)
    assert from_hz == 16_000
    pause = np.zeros(int(1.6 * from_hz))
    parts = np.concatenate([pause[: from_hz // 4], question, pause, question, pause])
    soundfile.write(path, np.repeat(parts, rate_hz // from_hz), rate_hz, subtype="PCM_16")


def chat(*arguments: str, server: str, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-c", COMMAND, "chat", "--server", server, *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=30)


def raw_question(rate_hz: int) -> bytes:
    """16-bit mono; without a filter, for the speech is low."""
    samples, from_hz = soundfile.read(QUESTION)
    places = np.arange(int(len(samples) * rate_hz / from_hz)) * from_hz / rate_hz
    resampled = np.interp(places, np.arange(len(samples)), samples)
    return (32767 * resampled).astype("<i2").tobytes()


# files


def test_files_are_turns_with_memory_and_become_numbered_replies() -> None:
    engine = speaker("Hello", "there")
    with serving(engine) as url:
        done = chat("question.wav", "question.wav", server=url)
    assert (done.returncode, done.stderr) == (0, b"")
    first, second = (request.messages for request in engine.requests)
    assert [message.role for message in first] == ["user"]
    assert [message.role for message in second] == ["user", "assistant", "user"]
    assert second[1].content == (Text("Hello there "),)
    assert all(isinstance(second[n].content[0], Audio) for n in (0, 2))
    np.testing.assert_allclose(second[0].content[0].samples, tone(0.3), atol=1e-3)
    for number in (1, 2):
        samples, rate_hz = soundfile.read(f"reply-{number}.wav")
        assert rate_hz == 24_000 and abs(len(samples) - 0.4 * rate_hz) < 3
    lines = done.stdout.decode().splitlines()
    assert lines[:2] == ["you: question.wav [0.3 s of sound]", "reply: Hello there "]
    assert lines[2].startswith("reply-1.wav: first text after 0.")
    assert "first audio after 0." in lines[2] and "0.40 s of sound in 0." in lines[2]
    assert "real-time factor" in lines[2] and lines[2].endswith("no gaps")


def test_what_is_no_sound_is_told_and_the_next_is_asked() -> None:
    Path("text.wav").write_text("no sound")
    engine = speaker("Hello")
    with serving(engine) as url:
        done = chat("none.wav", ".", "text.wav", "question.wav", server=url)
    assert done.returncode == 1 and len(engine.requests) == 1
    missing, folder, text = done.stderr.decode().splitlines()
    assert missing == "omnispeech: none.wav does not exist; name a sound file"
    assert folder == "omnispeech: . is a folder; name a sound file"
    assert "cannot be decoded" in text


class FailsOnce(FakeEngine):
    async def answer(self, request: TurnRequest) -> Any:
        failed = bool(self.requests)
        async for event in super().answer(request):
            yield event
            if not failed:
                raise GenerationError("the device failed")


def test_a_failed_turn_is_told_and_forgotten() -> None:
    engine = FailsOnce(TextDelta("a"), hum(0.1), WHOLE)
    with serving(engine) as url:
        done = chat("question.wav", "question.wav", server=url)
    assert (done.returncode, done.stderr) == (1, b"omnispeech: the device failed\n")
    assert [len(request.messages) for request in engine.requests] == [1, 1]


def test_a_recording_that_the_server_refuses_is_told_and_does_not_hang() -> None:
    Path("long.wav").write_bytes(sound_file(tone(1.5)))
    with serving(speaker("Hello"), max_audio_s=1.0) as url:
        done = chat("long.wav", "question.wav", server=url)
    assert done.returncode == 1 and b"1 s" in done.stderr
    assert done.stderr.count(b"\n") == 1 and b"reply: Hello" in done.stdout


def test_settings_reach_the_model() -> None:
    engine = speaker("Hello")
    flags = "--system", "Be brief.", "--temperature", "0", "--max-new-tokens", "9", "--text"
    with serving(engine) as url:
        assert chat("question.wav", *flags, server=url).returncode == 0
    request = engine.requests[0]
    assert (request.temperature, request.max_new_tokens, request.speech) == (0.0, 9, False)
    assert request.messages[0].content == (Text("Be brief."),)
    assert not Path("reply-1.wav").exists()


def test_a_setting_that_the_server_refuses_ends_it() -> None:
    engine = speaker("Hello")
    with serving(engine) as url:
        done = chat("question.wav", "--voice", "nobody", server=url)
    assert done.returncode == 1 and b"nobody" in done.stderr and not engine.requests


def test_both_sides_are_saved_and_a_second_conversation_goes_elsewhere() -> None:
    with serving(speaker("Hello", "there")) as url:
        done = chat("question.wav", "question.wav", "--save", "kept/it", server=url)
        again = chat("question.wav", "--save", "kept/it", server=url)
    assert done.stdout.endswith(b"saved in kept/it\n")
    lines = Path("kept/it/transcript.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "you: [0.3 s of sound]",
        "reply: Hello there",
    ] * 2
    names = sorted(path.name for path in Path("kept/it").glob("*.wav"))
    assert names == ["001-you.wav", "002-reply.wav", "003-you.wav", "004-reply.wav"]
    assert soundfile.info("kept/it/001-you.wav").duration == pytest.approx(0.3, abs=0.001)
    assert soundfile.info("kept/it/004-reply.wav").duration == pytest.approx(0.4, abs=0.001)
    assert again.returncode == 1 and b"give --save another folder" in again.stderr


def test_without_a_microphone_the_names_of_files_are_asked_for() -> None:
    engine = speaker("Hello")
    with serving(engine) as url:
        done = chat(server=url, stdin=b"\nnone.wav\nquestion.wav\nquestion.wav\nquit\nmore.wav\n")
    assert done.returncode == 1 and len(engine.requests) == 2
    assert done.stderr == b"omnispeech: none.wav does not exist; name a sound file\n"
    assert done.stdout.startswith(b"no microphone was found (it needs: pip install sounddevice")
    assert b"type the name of a sound file, or quit" in done.stdout
    assert done.stdout.count(b"sound file, or quit: ") == 5
    assert Path("reply-2.wav").exists()


# a pipe


@needs_vad
@pytest.mark.parametrize("rate_hz", [24_000, 44_100])
def test_a_pipe_is_heard_as_a_microphone_and_the_reply_comes_out_of_one(rate_hz: int) -> None:
    engine = speaker("Hello", "there")
    with serving(engine) as url:
        done = chat("-", "--rate", str(rate_hz), "-o", "-", server=url, stdin=raw_question(rate_hz))
    assert done.returncode == 0
    assert abs(len(done.stdout) - 2 * 24_000 * 0.4) < 6
    assert len(engine.requests) == 1
    heard = len(engine.heard[0].content[0].samples) / 16_000
    assert 1.5 < heard < 2.3
    told = done.stderr.decode()
    assert "reply: Hello there" in told and "endpointing 0." in told


@needs_vad
def test_what_was_said_is_written_where_the_server_can() -> None:
    engine = speaker("Hello")
    with serving(engine, TalkConfig(transcription="model")) as url:
        done = chat("-", "-o", "all.wav", "--save", "kept", server=url, stdin=raw_question(24_000))
    assert done.returncode == 0 and done.stderr == b""
    assert sorted(done.stdout.decode().splitlines())[-1] == "you: Hello"
    assert " you: Hello\n" in Path("kept/transcript.txt").read_text()


@needs_vad
def test_a_pipe_without_speech_says_so() -> None:
    with serving(speaker("Hello")) as url:
        done = chat("-", server=url, stdin=bytes(9600))
    assert done.returncode == 1
    assert b"no speech was heard in 0.2 s of sound" in done.stderr


def test_a_pipe_can_be_one_question() -> None:
    engine = speaker("Hello")
    pcm = (tone(0.3, 24_000) * 32767).astype("<i2").tobytes() + b"\0"  # and half a sample
    with serving(engine) as url:
        done = chat("-", "--push-to-talk", "-o", "all.wav", server=url, stdin=pcm)
    assert done.returncode == 0, done.stderr
    assert abs(len(engine.heard[0].content[0].samples) - 4800) < 60
    assert soundfile.info("all.wav").duration == pytest.approx(0.2, abs=0.001)


def test_a_listener_who_leaves_ends_it() -> None:
    near, far = os.pipe()
    os.close(near)
    with serving(speaker("Hello")) as url:
        command = [sys.executable, "-c", COMMAND, "chat", "question.wav", "-o", "-"]
        done = subprocess.run(
            [*command, "--server", url], stdout=far, stderr=subprocess.PIPE, timeout=30
        )
    os.close(far)
    assert done.returncode == 1 and b"the replies cannot be heard any more" in done.stderr


# what goes wrong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-", "question.wav"], "a pipe (-) and files cannot be asked together"),
        (["-", "--rate", "5"], "--rate 5: give 8000 to 192000 Hz"),
        (["question.wav", "-o", "reply.mp3"], "give -o a name that ends in .wav"),
        (["question.wav", "--text", "-o", "-"], "--text brings no sound to write"),
        (["question.wav", "--push-to-talk"], "each file is a question of its own"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--server", NOWHERE, *arguments]) == 1
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


@pytest.mark.parametrize("server", [NOWHERE, "localhost:9", "ftp://x", "http://["])
def test_no_server_is_one_line(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "question.wav", "--server", server]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    if server == NOWHERE:
        assert "model_worker.py --models" in told


def test_a_full_server_is_one_line() -> None:
    with serving(FakeEngine(), TalkConfig(max_talks=1)) as url, held(url):
        done = chat("question.wav", server=url)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert b"the server refused: all 1 places (max_talks) are taken" in done.stderr


@contextmanager
def held(url: str) -> Iterator[None]:
    """The one place of a server is taken."""
    with connect(f"ws{url.removeprefix('http')}/v1/realtime") as socket:
        socket.recv(5)
        yield


def test_the_key_is_sent_and_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = AccessConfig(api_keys=str(key_file(tmp_path, alice=ALICE)))
    with serving(speaker("Hello"), access=access) as url:
        done = chat("question.wav", server=url)
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1
        assert b"the server refused: an API key is needed" in done.stderr
        assert b"set OMNISPEECH_API_KEY" in done.stderr
        monkeypatch.setenv("OMNISPEECH_API_KEY", ALICE)
        assert chat("question.wav", server=url).returncode == 0


# a terminal


@pytest.fixture
def long_reply() -> Iterator[tuple[str, FakeEngine]]:
    """Whole at once, and 5 s of sound."""
    engine = speaker("one", "two", "three", "four", "five", "six", "seven", "ten", seconds=0.6)
    with serving(engine) as url:
        yield url, engine


@needs_vad
def test_hands_free_with_an_interruption_on_a_live_screen(
    devices: None, long_reply: tuple[str, FakeEngine]
) -> None:
    url, engine = long_reply
    with Window(["chat", "--server", url, "--save", "kept"], {}) as window:
        window.until_shown("Use\nearphones")
        window.until(lambda window: window.text().count("endpointing") == 2)
        window.until(lambda window: re.search(r"speaking  \[#.* 1\.[3-9] s$", window.text()))
        window.type("\x03")
        window.until(lambda window: window.text().count("the model remembers: one") == 2)
        window.until_shown("listening  [")
        window.type("\x03")
        assert window.status() == 0
    check_hands_free(window, engine)


def check_hands_free(window: Window, engine: FakeEngine) -> None:
    phases = [screen.splitlines()[-1].split("  [")[0] for screen in window.states if screen]
    assert {"listening", "hearing you", "speaking"} <= set(phases)
    assert any("hearing you  [####" in screen for screen in window.states)
    screen = window.text()
    assert screen.endswith("saved in kept\n") and screen.count("interrupted after ") == 2
    remembered = engine.requests[-1].messages[1].content[0].text
    assert remembered.startswith("one") and not remembered.endswith("ten")
    heard_s = Path("heard.raw").stat().st_size / 48_000
    kept = [soundfile.info(f"kept/{n:03d}-reply.wav").duration for n in (2, 4)]
    assert sum(kept) < heard_s < sum(kept) + 0.4  # what the device still held is not heard
    assert Path("kept/transcript.txt").read_text().count("[cut after ") == 2


@needs_vad
def test_a_device_with_a_rate_of_its_own(
    devices: None, long_reply: tuple[str, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVICE_RATE", "48000")
    speak_twice("microphone.wav", 48_000)
    url, engine = long_reply
    with Window(["chat", "--server", url], {}) as window:
        window.until_shown("endpointing")
        window.until(lambda _: Path("heard.raw").stat().st_size > 48_000)
        window.type("\x03")
        window.until_shown("interrupted")
        window.type("\x03")
        assert window.status() == 0
    assert 1.8 < len(engine.requests[0].messages[0].content[0].samples) / 16_000 < 2.8


def test_push_to_talk(devices: None, long_reply: tuple[str, FakeEngine]) -> None:
    url, engine = long_reply
    with Window(["chat", "--push-to-talk", "--server", url], {}) as window:
        window.until_shown("Enter begins and ends")
        window.type("\n")
        window.until_shown("hearing you  [##")
        time.sleep(0.6)
        window.type("\n")
        window.until_shown("speaking  [##")
        window.type("\n\n")  # interrupts and begins the next, ends it before anything is said
        window.until_shown("interrupted after")
        window.until_shown("that was too short")
        window.type("quit\n")
        assert window.status() == 0
    assert len(engine.requests) == 1
    assert 0.5 < len(engine.heard[0].content[0].samples) / 16_000 < 2.0
    assert "\nquit" not in window.text()  # keys do not show


def test_a_reply_that_is_read_while_it_comes_fits_the_width() -> None:
    words = (
        "Hello there, 你好你好你好你好你好 and \x1b[2J\x1b]0;title\x07 more of it, row after row."
    )
    with (
        serving(speaker(*words.split(" "))) as url,
        Window(["chat", "question.wav", "--server", url], {}, columns=40) as window,
    ):
        assert window.status() == 0
    rows = window.text().splitlines()
    assert rows[1:3] == ["reply: Hello there,", "你好你好你好你好你好 and [2J]0;title"]
    assert rows[3] == "more of it, row after row." and rows[4].startswith("reply-1.wav: ")
    assert "\x1b[2J" not in window.raw and "\x1b[2m" in window.raw


def test_no_color_is_respected() -> None:
    with serving(speaker("Hello")) as url:
        arguments = ["chat", "question.wav", "--server", url]
        with Window(arguments, {"NO_COLOR": "1"}) as window:
            assert window.status() == 0
    assert "m" not in {found for found in window.raw.split("\x1b[")[1:] for found in found[:3]}


# lost connections


class Slow(FakeEngine):
    """Its first reply stops in the middle until it is given up."""

    async def answer(self, request: TurnRequest) -> Any:
        count = len(self.requests)
        async for event in super().answer(request):
            yield event
            if count == 0 and isinstance(event, AudioDelta):
                await asyncio.sleep(30)


def test_a_lost_connection_comes_back_and_the_question_is_asked_again() -> None:
    engine = Slow(TextDelta("Hello "), hum(0.2), TextDelta("again"), WHOLE)
    with (
        serving(engine) as url,
        line_to(url) as line,
        Window(["chat", "question.wav", "--server", line.url], {}) as window,
    ):
        window.until_shown("reply: Hello")
        lose(line, window)
        assert window.status() == 0
    screen = window.text()
    assert "the connection is lost" in screen and "connected again" in screen
    assert "reply: Hello again" in screen
    assert [len(request.messages) for request in engine.requests] == [1, 1]
    assert soundfile.info("reply-1.wav").duration == pytest.approx(0.2, abs=0.001)


def lose(line: Line, window: Window) -> None:
    line.cut()
    window.until_shown("connection lost  [")
    line.mend()


def test_a_conversation_that_is_gone_is_one_clear_line() -> None:
    engine = Slow(TextDelta("Hello "), hum(0.2), WHOLE)
    with (
        serving(engine, TalkConfig(resume_s=0.0)) as url,
        line_to(url) as line,
        Window(["chat", "question.wav", "--server", line.url], {}) as window,
    ):
        window.until_shown("reply: Hello")
        lose(line, window)
        assert window.status() == 1
    assert "the server no longer has the conversation" in " ".join(window.text().split())


# the SDK in place of a library of our own


def example(question: Path, url: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, TESTS.parent / "examples" / "talk.py", question],
        env={**os.environ, "OPENAI_BASE_URL": f"{url}/v1"},
        capture_output=True,
        timeout=30,
    )


def test_the_example_of_the_sdk_talks() -> None:
    pytest.importorskip("openai")
    engine = speaker("Hello", "there")
    with serving(engine) as url:
        done = example(QUESTION, url)
    assert (done.returncode, done.stdout) == (0, b"Hello there \nreply.wav\n"), done.stderr
    assert soundfile.info("reply.wav").duration == pytest.approx(0.4, abs=0.001)
    assert len(engine.heard[0].content[0].samples) == soundfile.info(QUESTION).frames


def test_the_example_refuses_what_would_be_heard_as_noise() -> None:
    pytest.importorskip("openai")
    Path("stereo.wav").write_bytes(sound_file(tone(0.3, channels=2)))
    done = example(Path("stereo.wav"), NOWHERE)
    assert done.returncode == 1
    assert done.stderr == b"stereo.wav: 2 channels of 16 bits; give 16-bit mono sound\n"


def test_the_lines_of_the_readme_talk() -> None:
    pytest.importorskip("openai")
    readme = (TESTS.parent / "README.md").read_text(encoding="utf-8")
    lines = readme.split("```python\n")[1].split("```")[0]
    engine = speaker("Hello")
    with serving(engine) as url:
        command = [sys.executable, "-c", lines.replace("http://127.0.0.1:8000", url)]
        done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, b"Hello "), done.stderr
    assert len(engine.heard[0].content[0].samples) == soundfile.info(QUESTION).frames
