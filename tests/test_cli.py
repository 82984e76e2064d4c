"""The commands, as a user types them."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import soundfile
from controller_server import Controller, controller_on_loopback
from quantized_models import quantize_language_model, quantize_opens2s

from omnispeech import __version__
from omnispeech.cli import main, worker
from omnispeech.config import ServerConfig
from omnispeech.server.door import listen

ROOT = Path(__file__).parent.parent
QUESTION = ROOT / "examples" / "question.wav"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    assert main(["tiny", str(directory), "--seed", "3"]) == 0
    return directory


class Server:
    """`python model_worker.py`, its address once it is known, and what it printed."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "model_worker.py", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def url(self) -> str:
        while True:
            for line in list(self.lines):
                if match := re.search(r"running on (http://\S+)", line):
                    return match[1]
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.02)

    def until_ready(self) -> str:
        while httpx.get(f"{self.url}/ready").status_code != 200:
            time.sleep(0.1)
        return self.url

    def close(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=30)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Server]:
    one = Server("--models", str(models), "--port", "0", "--device", "cpu")
    yield one
    one.close()


def test_health_answers_before_the_models_are_ready(server: Server) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.until_ready()


def test_a_spoken_question_is_answered_over_http(server: Server, tmp_path: Path) -> None:
    reply = tmp_path / "reply.wav"
    url = server.until_ready()
    asked = ["say", str(QUESTION), "-o", str(reply), "--server", url, "--seed", "5"]
    assert main(asked) == 0
    samples, rate_hz = soundfile.read(reply)
    assert rate_hz == 22050
    assert abs(samples).max() > 0.01


def test_length_of_the_sound_is_that_of_its_units(server: Server) -> None:
    """441 frames of 256 samples per 64 units, rounded down."""
    url = server.until_ready()
    answer = httpx.post(
        f"{url}/v1/speech?format=pcm&max_new_tokens=8&seed=1", content=QUESTION.read_bytes()
    )
    turn = httpx.get(f"{url}/v1/speech/{answer.headers['X-Turn-Id']}").json()
    assert len(answer.content) / 2 == turn["usage"]["units"] * 441 // 64 * 256


def test_a_seed_gives_the_same_reply_again(server: Server) -> None:
    url = server.until_ready()
    texts = []
    for _ in range(2):
        answer = httpx.post(
            f"{url}/v1/speech?format=pcm&max_new_tokens=16&seed=9", content=QUESTION.read_bytes()
        )
        texts.append(httpx.get(f"{url}/v1/speech/{answer.headers['X-Turn-Id']}").json()["text"])
    assert texts[0] == texts[1] != ""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory of which two are quantized."""
    directory = tmp_path_factory.mktemp("quantized")
    assert main(["tiny", str(directory), "--seed", "3"]) == 0
    quantize_language_model(directory / "OpenS2S", directory / "OpenS2S-llm-awq")
    quantize_opens2s(directory / "OpenS2S", directory / "OpenS2S-8bit")
    assert main(["verify", "--models", str(directory)]) == 0
    return directory


@pytest.mark.parametrize(
    ("llm", "lines"),
    [
        (
            "awq",
            ["Loading AWQ-quantized LLM from MODELS/OpenS2S-llm-awq...", "AWQ-quantized LLM l"],
        ),
        (
            "8bit",
            ["Using pre-quantized model: MODELS/OpenS2S-8bit", "INT8-quantized model loaded (8"],
        ),
    ],
)
def test_a_spoken_question_is_answered_by_a_quantized_model(
    quantized: Path, llm: str, lines: list[str], tmp_path: Path
) -> None:
    one = Server("--models", str(quantized), "--port", "0", "--device", "cpu", "--llm", llm)
    try:
        reply = tmp_path / "reply.wav"
        asked = ["say", str(QUESTION), "-o", str(reply), "--seed", "1"]
        assert main([*asked, "--server", one.until_ready()]) == 0
        assert abs(soundfile.read(reply)[0]).max() > 0.01
    finally:
        one.close()
    shown = "".join(one.lines)
    assert all(line.replace("MODELS", str(quantized)) in shown for line in lines)
    assert re.search(r"Total memory of the weights: [1-9]\d*\.\d (kB|MB)", shown)
    assert not re.search(r"\b0\.0* [kMG]B", shown)


def test_sigterm_ends_the_server_cleanly(models: Path) -> None:
    one = Server("--models", str(models), "--port", "0", "--device", "cpu")
    one.until_ready()
    assert one.close() == 0
    assert not [line for line in one.lines if "Traceback" in line]


def test_a_served_model_is_known_to_its_controller_until_it_is_stopped(models: Path) -> None:
    controller = Controller()
    with controller_on_loopback(controller.app()) as url:
        one = Server("--models", str(models), "--port", "0", "--device", "cpu", "--controller", url)
        address = one.until_ready()
        while not controller.workers:
            time.sleep(0.05)
        assert controller.choose("omnispeech") == address
        assert one.close() == 0
        assert controller.choose("omnispeech") == ""
    log = "".join(one.lines)
    assert f"registered with the controller {url} as {address}" in log
    assert "HTTP Request" not in log  # a line for each heartbeat


def test_damaged_models_end_the_server_with_the_reason(models: Path, tmp_path: Path) -> None:
    broken = tmp_path / "models"
    for name in ("OpenS2S", "glm-4-voice-decoder"):
        (broken / name).mkdir(parents=True)
    one = Server("--models", str(broken), "--port", "0", "--device", "cpu")
    assert one.process.wait(timeout=60) == 1
    one.close()
    assert "config.json" in "".join(one.lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "/no/such/place"], "omnispeech small /no/such/place"),
        (["--models", "MODELS", "--device", "gpu"], "allowed: auto, cpu, cuda"),
        (["--models", "MODELS", "--dtype", "int3"], "allowed: auto, bf16, fp16, fp32"),
        (["--models", "MODELS", "--port", "99999"], "port=99999; allowed: 0 to 65535"),
        (["--models", "MODELS", "--device", "meta"], "allowed: auto, cpu, cuda"),
        (["--models", "MODELS/OpenS2S"], "one level too deep; use --models MODELS"),
        (["--models", "MODELS", "--host", "no.such.host.invalid"], "cannot listen on no.such.host"),
        (["--models", "MODELS", "--host", "a..b"], "cannot listen on a..b:8000"),
        (["--models", "MODELS", "--llm", "awq"], "python quantize_llm_awq.py"),
        (["--models", "MODELS", "--kernel", "marlin"], "is one of the package gptqmodel"),
        (["--config", "/no/such/file.toml"], "does not exist"),
        (["--config", "/"], "cannot be read"),
        (["--models", "MODELS", "--controller", "c:21001"], "controller='c:21001'; allowed: a URL"),
        (["--controller", "http://c:21001", "--host", "0.0.0.0"], "give --worker-address"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(
    arguments: list[str], message: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert worker([a.replace("MODELS", str(models)) for a in arguments]) == 1
    error = capsys.readouterr().err
    assert message.replace("MODELS", str(models)) in error
    assert error.count("\n") == 1


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_every_address_means_those_of_ipv4_too() -> None:
    with listen(ServerConfig(host="::", port=0)) as door:
        socket.create_connection(("127.0.0.1", door.getsockname()[1]), timeout=5).close()


def test_a_port_in_use_is_one_clear_line_before_anything_is_loaded(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omnispeech.assembly.load_sources", lambda *_, **__: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status = worker(["--models", str(models), "--port", str(port), "--device", "cpu"])
    assert status == 1
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}" in error and "--port" in error
    assert error.count("\n") == 1


def test_a_misspelt_variable_is_warned_about_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OMNISPEECH_PROT", "1")
    monkeypatch.setenv("OMNISPEECH_MODELS", "/no/such/place")
    assert worker([]) == 1
    assert "OMNISPEECH_PROT" in caplog.text and "OMNISPEECH_MODELS" not in caplog.text


def test_an_error_of_the_file_system_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["tiny", str(tmp_path / "file" / "models")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_tiny_refuses_to_overwrite(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", str(models)]) == 1
    assert str(models) in capsys.readouterr().err


@pytest.mark.parametrize("golden", ["opens2s", "decoder"])
def test_parity_passes_on_the_golden_sets(golden: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", str(ROOT / "tests" / "golden" / golden)]) == 0
    assert re.search(r"[1-9]\d* compared, 0 failed", capsys.readouterr().out)


def test_parity_of_nothing_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", str(tmp_path)]) == 1
    assert "no golden directory" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_help_of_the_worker_shows_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        worker(["--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--host", "--port", "--models", "--device", "--dtype"))
    assert all(
        flag in shown for flag in ("--llm {auto,bf16,awq,gptq,8bit}", "--speech-lm", "--kernel")
    )
    assert "--max-conversations" in shown
    assert all(f"\n{title}:\n" in shown for title in ("engine", "speech decoder", "server"))


@pytest.mark.parametrize("command", ["say", "chat", "tiny", "verify", "forget", "train-bridge"])
def test_every_option_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert not re.findall(r"^ +--[\w-]+ [A-Z_]+\n(?= +-|\Z)", shown, re.MULTILINE)
