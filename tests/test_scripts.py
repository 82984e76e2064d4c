"""The scripts, with the environment of these tests in place of their own."""

import os
import pty
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("build_and_run.sh", "container.sh", "environment.sh", "requirements.txt", "pyproject.toml")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A copy of the scripts whose environment counts as made."""
    for name in FILES:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    program(python, f'exec {sys.executable} "$@"')
    made_from = "".join((ROOT / name).read_text() for name in FILES[3:4] * 2 + FILES[4:])
    (tmp_path / ".venv/made-from-requirements.txt").write_text(made_from)
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin/docker", "exit 1")  # a container of this machine is out of reach
    return tmp_path


def program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def run(
    place: Path, *arguments: str, stdout: int = subprocess.PIPE, **variables: str
) -> subprocess.CompletedProcess[str]:
    environ = {n: v for n, v in os.environ.items() if not n.startswith("OMNISPEECH_")}
    environ |= {"PATH": f"{place / 'bin'}:{environ['PATH']}"} | variables
    command = ["bash", str(place / "build_and_run.sh"), *arguments]
    return subprocess.run(
        command, env=environ, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60
    )


def fake_server(place: Path, body: str) -> int:
    """What stands for the server; gives a port that is free."""
    (place / "model_worker.py").write_text(body)
    program(place / ".venv/bin/omnispeech", 'echo "asked $*"')
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


READY = """
import http.server, sys
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
server = http.server.HTTPServer(("127.0.0.1", port), Ready)
print(f"running on http://127.0.0.1:{port}", flush=True)
server.serve_forever()
"""


def test_a_port_that_is_taken_is_refused_before_the_server_is_started(place: Path) -> None:
    fake_server(place, "open('started', 'w')")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ran = run(place, "--local", "--models", "/m", "--port", str(port))
    assert ran.returncode == 1
    assert f"port {port} is taken" in ran.stderr and "--port" in ran.stderr
    assert not (place / "started").exists() and "asked" not in ran.stdout


@pytest.mark.parametrize("port", ["0", "http", "65536", "-1", "", "99999999999999999999"])
def test_a_port_that_is_none_is_refused(place: Path, port: str) -> None:
    ran = run(place, "--local", "--port", port)
    assert ran.returncode == 1
    assert ran.stderr == f"build_and_run.sh: --port '{port}'; allowed: 1 to 65535\n"


def test_port_and_device_come_from_the_environment_too(place: Path) -> None:
    port = fake_server(place, "import sys\nsys.exit(' '.join(sys.argv))")
    variables = {"OMNISPEECH_PORT": str(port), "OMNISPEECH_DEVICE": "cuda:1"}
    ran = run(place, "--local", "--models", "/m", **variables)
    assert f"--models /m --device cuda:1 --host 127.0.0.1 --port {port}" in ran.stderr


def test_stop_says_what_it_did(place: Path) -> None:
    assert run(place, "--stop", OMNISPEECH_PORT="0").stdout == "no server was running\n"
    port = fake_server(place, READY)
    ran = run(place, "--local", "--models", "/m", "--port", str(port))
    assert ran.returncode == 0, ran.stderr
    assert f"-o {place}/reply.wav" in ran.stdout
    assert run(place, "--stop").stdout == "stopped\n"
    assert run(place, "--stop").stdout == "no server was running\n"


def test_a_local_server_is_on_loopback_unless_it_is_told_otherwise(place: Path) -> None:
    port = str(fake_server(place, "import sys\nsys.exit(' '.join(sys.argv))"))
    local = ("--local", "--models", "/m", "--port", port)
    assert f"--host 127.0.0.1 --port {port}\n" in run(place, *local).stderr
    refused = run(place, *local, "--listen", "0.0.0.0")
    assert refused.returncode == 1 and "or say --no-key" in refused.stderr
    assert "--host" not in refused.stderr
    meant = run(place, *local, "--listen", "0.0.0.0", "--no-key")
    assert f"--host 0.0.0.0 --port {port}\n" in meant.stderr


def test_a_local_server_takes_the_keys_of_the_models_directory(place: Path) -> None:
    port = fake_server(place, READY)
    (place / "models").mkdir()
    (place / "models/api-keys.toml").touch()
    local = ("--local", "--once", "--models", str(place / "models"), "--port", str(port))
    ran = run(place, *local)
    assert ran.returncode == 0, ran.stderr
    assert "No question was asked: OMNISPEECH_API_KEY holds no key" in ran.stdout
    ran = run(place, *local, OMNISPEECH_API_KEY="0123456789-abcdef")
    assert ran.returncode == 0 and "asked say" in ran.stdout


# ---- the small model


MADE = """
case $1 in
small) mkdir -p "$2/OpenS2S" "$2/glm-4-voice-decoder"
    echo '"by": "omnispeech small"' > "$2/omnispeech-manifest.json";;
esac
echo "asked $*"
"""


@pytest.fixture
def once(place: Path) -> tuple[str, ...]:
    """Arguments with which a server answers one question on the small model."""
    port = fake_server(place, "import os\nprint(os.environ['OMP_NUM_THREADS'], flush=True)" + READY)
    program(place / ".venv/bin/omnispeech", MADE)
    return ("--local", "--once", "--port", str(port))


def test_without_models_the_small_model_is_asked(place: Path, once: tuple[str, ...]) -> None:
    models = place / ".local/models"
    ran = run(place, *once, OMP_NUM_THREADS="")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"asked small {models}\nasked say examples/question.wav -o ")
    assert '"repeat after me apple tiger"' in ran.stdout and "MODEL_CARD.md" in ran.stdout
    assert ".venv/bin/omnispeech fetch --models DIR brings it, 22 GB" in ran.stdout
    assert (place / ".local/server.log").read_text().startswith("2\n")
    assert "asked small" not in run(place, *once).stdout  # it is there


def test_the_reply_is_played_to_somebody_at_a_terminal(place: Path, once: tuple[str, ...]) -> None:
    program(place / "bin/afplay", f'echo "$@" > {place}/played')
    run(place, *once)
    assert not (place / "played").exists()
    ours, theirs = pty.openpty()
    ran = run(place, *once, stdout=theirs)
    os.close(theirs)
    os.close(ours)
    assert ran.returncode == 0, ran.stderr
    assert (place / "played").read_text() == f"{place}/reply.wav\n"


@pytest.mark.parametrize("by", ["tiny", "small"])
def test_what_an_earlier_version_made_makes_way_and_is_kept(
    place: Path, once: tuple[str, ...], by: str
) -> None:
    models = place / ".local/models"
    for folder in (models, place / "omnispeech/small"):
        (folder / "OpenS2S/tts").mkdir(parents=True)
        (folder / "glm-4-voice-decoder").mkdir()
        (folder / "OpenS2S/tts/tokenizer.json").write_text(str(folder))
    (models / "omnispeech-manifest.json").write_text(f'{{"by": "omnispeech {by}",\n "seed": 0}}')
    ran = run(place, *once)
    assert ran.returncode == 0, ran.stderr
    [old] = place.glob(".local/models-old-*")
    assert (old / "OpenS2S/tts/tokenizer.json").read_text() == str(models)
    assert f"was moved to {old}: delete" in ran.stdout
    assert f"asked small {models}\n" in ran.stdout


def test_the_small_model_of_this_version_stays(place: Path, once: tuple[str, ...]) -> None:
    models = place / ".local/models"
    for folder in (models, place / "omnispeech/small"):
        (folder / "OpenS2S").mkdir(parents=True)
        (folder / "glm-4-voice-decoder").mkdir()
        (folder / "OpenS2S/vocab.json").write_text("the same")
    (models / "glm-4-voice-decoder/flow.safetensors").touch()  # a conversion
    (models / "omnispeech-manifest.json").write_text('{"by": "omnispeech small"}')
    ran = run(place, *once)
    assert ran.returncode == 0 and "asked small" not in ran.stdout and "moved" not in ran.stdout


@pytest.mark.parametrize("name", ["OpenS2S", "OpenS2S-8bit"])
def test_what_somebody_put_there_himself_is_kept_and_used(
    place: Path, once: tuple[str, ...], name: str
) -> None:
    models = place / ".local/models"
    (models / name).mkdir(parents=True)
    (models / "glm-4-voice-decoder").mkdir()
    ran = run(place, *once)
    assert ran.returncode == 0, ran.stderr
    assert "asked small" not in ran.stdout and "This is the small model" not in ran.stdout


def test_one_that_was_cut_short_is_completed(place: Path, once: tuple[str, ...]) -> None:
    (place / ".local/models/OpenS2S").mkdir(parents=True)
    assert "asked small" in run(place, *once).stdout


def test_models_that_are_named_are_taken_as_they_are(place: Path, once: tuple[str, ...]) -> None:
    ran = run(place, *once, "--models", str(place / "none"))
    assert "asked small" not in ran.stdout and not (place / ".local/models").exists()


def test_a_server_that_ends_while_another_answers_is_not_believed(place: Path) -> None:
    """Between the check and the start somebody else may take the port."""
    two = "import os, time\nif os.fork():\n    time.sleep(1)\n    sys.exit(3)\nserver ="
    other = READY.replace("server =", two).replace("print(", "str(")
    port = fake_server(place, other.replace("serve_forever()", "handle_request()"))
    (place / ".local").mkdir()
    (place / ".local/server.log").write_text("running on http://127.0.0.1:1")  # of the last one
    ran = run(place, "--local", "--models", "/m", "--port", str(port))
    assert ran.returncode == 1
    assert "the server ended" in ran.stderr and "asked" not in ran.stdout


def make(place: Path, file: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-ec", f'. ./environment.sh; make_environment {file}; echo "$bin"']
    environ = {**os.environ, "PYTHON": str(place / "python")}
    environ.pop("OMNISPEECH_VENV", None)
    return subprocess.run(
        command, cwd=place, env=environ, capture_output=True, text=True, timeout=60
    )


def test_each_requirements_file_has_its_own_stamp(place: Path) -> None:
    (place / "requirements-dev.txt").write_bytes((ROOT / "requirements-dev.txt").read_bytes())
    program(place / ".venv/bin/python", 'echo "$@" >> calls')
    assert make(place, "requirements-dev.txt").returncode == 0
    assert "requirements-dev.txt" in (place / "calls").read_text()
    (place / "calls").unlink()
    for name in ("requirements.txt", "requirements-dev.txt"):
        assert make(place, name).stdout == ".venv/bin\n"
    assert not (place / "calls").exists()


def test_an_environment_without_pip_is_made_again(place: Path) -> None:
    (place / ".venv/made-from-requirements.txt").unlink()
    (place / ".venv/pyvenv.cfg").touch()
    program(place / ".venv/bin/python", "exit 1")
    program(place / "python", f'[ "$1" = -c ] || echo "$@" >> calls; exec {sys.executable} -c ""')
    make(place, "requirements.txt")
    assert (place / "calls").read_text() == "-m venv --clear .venv\n"
