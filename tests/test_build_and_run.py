"""build_and_run.sh with Docker, which is played by fake_docker.py."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_docker
import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("build_and_run.sh", "container.sh", "environment.sh")
# a real Docker of this machine is out of reach
TOOLS = (
    "bash",
    "sh",
    "cat",
    "dirname",
    "find",
    "grep",
    "mkdir",
    "ps",
    "seq",
    "sleep",
    "stat",
    "tr",
)


class Machine:
    """Where the script runs: its tools, its home directory, what it has called."""

    def __init__(self, place: Path) -> None:
        self.place, self.home, self.programs = place, place / "home", place / "programs"
        self.home.mkdir()
        self.programs.mkdir()
        for name in SCRIPTS:
            shutil.copy(ROOT / name, place / name)
        for name in TOOLS:
            if found := shutil.which(name):
                (self.programs / name).symlink_to(found)
        self.program("docker", f'exec {sys.executable} -S {fake_docker.__file__} "$@"')
        self.program("nvidia-smi", "exit 0")
        self.program("sleep", f"exec {shutil.which('sleep')} 0.05")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])

    def program(self, name: str, line: str) -> None:
        path = self.programs / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def says(self, name: str, text: str = "") -> None:
        (self.place / name).write_text(text)

    def start(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environ = {
            "PATH": str(self.programs),
            "HOME": str(self.home),
            "FAKE_DOCKER": str(self.place),
            "OMNISPEECH_PORT": str(self.port),
        }
        return subprocess.run(
            ["bash", str(self.place / "build_and_run.sh"), *arguments],
            env=environ | variables,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[list[str]]:
        path = self.place / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def called(self, *commands: str) -> list[str]:
        """The first words of the calls that change something, in their order."""
        return [call[0] for call in self.calls if call[0] in (commands or CHANGES)]

    @property
    def made(self) -> list[str]:
        """The arguments of the last server that was made."""
        return next(c for c in reversed(self.calls) if c[0] == "create")

    def containers(self) -> dict[str, bool]:
        """The name of each one there is, and whether it runs."""
        return {
            path.name.removeprefix("container-"): '"running": "true"' in path.read_text()
            for path in self.place.glob("container-*")
        }

    def value(self, option: str) -> str:
        return self.made[self.made.index(option) + 1]

    def environment(self) -> list[str]:
        return [self.made[i + 1] for i, word in enumerate(self.made) if word == "--env"]


KEY = "0123456789-abcdef-0123456789"
CHANGES = ("build", "create", "start", "run", "stop")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    for state in tmp_path.glob("container-*"):
        if pid := json.loads(state.read_text()).get("pid"):
            os.kill(pid, 9)


def test_one_command_builds_starts_and_waits_until_the_server_is_ready(machine: Machine) -> None:
    ran = machine.start()
    assert ran.returncode == 0, ran.stderr
    assert machine.called() == ["build", "create", "start"]
    assert (machine.home / "models").is_dir()
    assert machine.containers() == {"opens2s-server": True}
    assert machine.value("--volume") == f"{machine.home}/models:/models"
    assert machine.value("--publish") == f"127.0.0.1:{machine.port}:8000"
    assert machine.value("--gpus") == "all" and "--init" in machine.made
    assert machine.value("--restart") == "unless-stopped"
    assert machine.made[-1] == "omnispeech:server"
    assert f"http://127.0.0.1:{machine.port}" in ran.stdout
    assert "docker exec -it opens2s-server python3 /app/quantize_llm_awq.py" in ran.stdout


def test_what_was_quantized_already_is_not_advised_again(machine: Machine) -> None:
    (machine.home / "models/OpenS2S-llm-awq").mkdir(parents=True)
    assert "quantize_llm" not in machine.start().stdout


def test_a_second_call_replaces_the_container_and_keeps_the_models(machine: Machine) -> None:
    assert machine.start().returncode == 0
    (machine.home / "models/kept").touch()
    ran = machine.start()
    assert ran.returncode == 0, ran.stderr
    assert machine.called()[3:] == ["build", "create", "stop", "start"]
    assert machine.containers() == {"opens2s-server": True}
    assert (machine.home / "models/kept").exists() and "is kept" in ran.stdout


def test_models_port_gpu_address_and_restart_policy_are_chosen(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    ran = machine.start(
        *("--models", "mine/models", "--port", port, "--gpus", "device=1"),
        *("--listen", "0.0.0.0", "--no-key", "--restart-policy", "no"),
    )
    assert ran.returncode == 0, ran.stderr
    assert machine.value("--volume") == f"{machine.home}/mine/models:/models"
    assert machine.value("--publish") == f"0.0.0.0:{port}:8000"
    assert machine.value("--gpus") == "device=1" and machine.value("--restart") == "no"


def test_without_a_gpu_the_image_is_the_small_one(machine: Machine) -> None:
    machine.says("info", '{"runc":{}} []')
    machine.program("nvidia-smi", "exit 9")
    ran = machine.start("--cpu")
    assert ran.returncode == 0, ran.stderr
    build = next(call for call in machine.calls if call[0] == "build")
    assert "TORCH_INDEX=" in build[build.index("--build-arg") + 1]
    assert "--gpus" not in machine.made and machine.made[-1] == "omnispeech:server-cpu"
    assert "OMNISPEECH_DEVICE=cpu" in machine.environment()


def test_the_server_runs_as_the_owner_of_the_models(machine: Machine) -> None:
    (machine.home / "models").mkdir()
    if os.getuid() == 0:
        os.chown(machine.home / "models", 1234, 1235)
    machine.start()
    there = (machine.home / "models").stat()
    assert machine.value("--user") == f"{there.st_uid}:{there.st_gid}"


@pytest.mark.skipif(os.getuid() != 0, reason="gives a file to another user")
def test_behind_a_link_the_owner_is_that_of_the_directory(machine: Machine) -> None:
    (machine.place / "disk/OpenS2S").mkdir(parents=True)
    os.chown(machine.place / "disk", 1234, 1235)
    (machine.home / "models").symlink_to(machine.place / "disk")
    ran = machine.start()
    assert machine.value("--user") == "1234:1235"
    assert f"sudo chown -R 1234:1235 {machine.home}/models" in ran.stderr


def test_a_quoted_tilde_is_the_home_directory(machine: Machine) -> None:
    machine.start("--models", "~/my models")
    assert machine.value("--volume") == f"{machine.home}/my models:/models"


def test_in_a_rootless_daemon_the_user_of_this_machine_is_root(machine: Machine) -> None:
    machine.says("info", fake_docker.RUNTIMES + " [name=rootless]")
    machine.start()
    assert machine.value("--user") == "0:0"


@pytest.mark.skipif(os.getuid() != 0, reason="gives a file to another user")
def test_files_of_another_user_are_warned_of(machine: Machine) -> None:
    (machine.home / "models/OpenS2S").mkdir(parents=True)
    os.chown(machine.home / "models", 1234, 1235)
    ran = machine.start()
    assert ran.returncode == 0
    assert f"sudo chown -R 1234:1235 {machine.home}/models" in ran.stderr


def test_settings_and_tokens_reach_the_server_by_name(machine: Machine) -> None:
    variables = {"HF_TOKEN": "hf_secret", "OMNISPEECH_LLM": "gptq", "OMNISPEECH_MODELS": ""}
    assert machine.start(**variables).returncode == 0
    assert machine.environment() == ["HF_TOKEN", "OMNISPEECH_LLM"]
    assert "hf_secret" not in (machine.place / "calls").read_text()


def test_replies_under_way_have_their_time_when_the_container_is_stopped(machine: Machine) -> None:
    machine.start(OMNISPEECH_DRAIN_S="90.5")
    assert int(machine.value("--stop-timeout")) > 91
    machine.start(OMNISPEECH_DRAIN_S="08")
    assert machine.value("--stop-timeout") == "23"


def test_a_wrong_time_for_replies_leaves_the_old_server_alone(machine: Machine) -> None:
    machine.start()
    ran = machine.start(OMNISPEECH_DRAIN_S="1e3")
    assert ran.returncode == 1 and "OMNISPEECH_DRAIN_S='1e3'; allowed" in ran.stderr
    assert machine.called() == ["build", "create", "start"]


# ---- the small model


def of_server(machine: Machine) -> list[str]:
    return [one for one in machine.environment() if "SMALL" in one]


def test_the_small_model_is_one_setting(machine: Machine) -> None:
    assert machine.start("--small").returncode == 0
    assert of_server(machine) == ["OMNISPEECH_SMALL=true"]
    machine.start(OMNISPEECH_SMALL="yes")
    assert of_server(machine) == ["OMNISPEECH_SMALL=yes"]
    machine.start("--small", OMNISPEECH_SMALL="no")
    assert of_server(machine) == ["OMNISPEECH_SMALL=true"]
    machine.start()
    assert of_server(machine) == []


def test_it_is_told_what_can_be_asked_of_it_and_how_the_other_comes(machine: Machine) -> None:
    (machine.home / "models").mkdir()
    manifest = machine.home / "models/omnispeech-manifest.json"
    manifest.write_text('"by": "omnispeech small"')
    ran = machine.start("--small")
    assert '"what is three plus four"' in ran.stdout and "quantize" not in ran.stdout
    assert "docker exec opens2s-server omnispeech fetch --update\n" in ran.stdout
    manifest.unlink()
    ran = machine.start("--small")
    assert "small" not in ran.stdout and "python3 /app/quantize_llm_awq.py" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "variable", "command"),
    [
        (["--small"], "", ["omnispeech", "small", "/models"]),
        ([], "YES", ["omnispeech", "small", "/models"]),
        ([], "off", ["omnispeech", "fetch"]),
        ([], "", ["omnispeech", "fetch"]),
    ],
)
def test_what_is_to_be_quantized_is_the_small_model_where_it_is_asked_for(
    machine: Machine, arguments: list[str], variable: str, command: list[str]
) -> None:
    ran = machine.start("--quantize", *arguments, OMNISPEECH_SMALL=variable)
    assert ran.returncode == 0, ran.stderr
    first = next(call for call in machine.calls if call[0] == "run")
    assert first[-len(command) :] == command


# ---- keys


def test_other_machines_are_let_in_only_with_a_key_or_where_none_is_meant(machine: Machine) -> None:
    refused = machine.start("--listen", "0.0.0.0")
    assert refused.returncode == 1 and machine.calls == []
    assert "export OMNISPEECH_API_KEY=$(openssl rand -hex 24), or say --no-key" in refused.stderr
    assert machine.start("--listen", "0.0.0.0", "--no-key").returncode == 0
    assert machine.start("--listen", "0.0.0.0", OMNISPEECH_API_KEY=KEY).returncode == 0


def test_a_key_reaches_the_server_by_name_and_stands_nowhere(machine: Machine) -> None:
    ran = machine.start(OMNISPEECH_API_KEY=KEY)
    assert machine.environment() == ["OMNISPEECH_API_KEY"]
    assert KEY not in (machine.place / "calls").read_text() + ran.stdout + ran.stderr
    assert 'curl -H "Authorization: Bearer $OMNISPEECH_API_KEY" --data' in ran.stdout


def test_keys_in_the_models_directory_are_those_of_the_server(machine: Machine) -> None:
    (machine.home / "models").mkdir()
    (machine.home / "models/api-keys.toml").touch()
    ran = machine.start("--listen", "0.0.0.0")
    assert ran.returncode == 0, ran.stderr
    assert machine.environment() == ["OMNISPEECH_API_KEYS=/models/api-keys.toml"]
    there = str(machine.home / "models/api-keys.toml")
    machine.start(OMNISPEECH_API_KEYS=there)
    assert machine.environment() == ["OMNISPEECH_API_KEYS=/models/api-keys.toml"]


def test_keys_elsewhere_would_not_be_seen_in_the_container(machine: Machine) -> None:
    ran = machine.start(OMNISPEECH_API_KEYS="/etc/keys.toml")
    assert ran.returncode == 1 and machine.calls == []
    assert f"reads {machine.home}/models/api-keys.toml: copy it there" in ran.stderr


def test_no_key_where_there_is_one_contradicts_itself(machine: Machine) -> None:
    ran = machine.start("--no-key", OMNISPEECH_API_KEY=KEY)
    assert ran.returncode == 1 and "take it away, or leave --no-key out" in ran.stderr


def test_what_is_told_at_the_end_names_the_page_and_the_way_for_others(machine: Machine) -> None:
    ran = machine.start()
    assert f"http://127.0.0.1:{machine.port}/ in a browser" in ran.stdout
    assert f"ssh -L {machine.port}:127.0.0.1:{machine.port}" in ran.stdout
    assert "curl --data-binary" in ran.stdout  # no key
    assert "ssh -L" not in machine.start("--listen", "0.0.0.0", "--no-key").stdout


def test_a_server_of_https_is_asked_inside_its_container(machine: Machine) -> None:
    files = {"OMNISPEECH_TLS_CERTIFICATE": "/models/a.pem", "OMNISPEECH_TLS_KEY": "/models/a.key"}
    ran = machine.start(**files)
    assert ran.returncode == 0, ran.stderr
    asked = [call for call in machine.calls if call[0] == "exec"]
    assert asked == [["exec", "opens2s-server", "answers", "/ready"]] * 2
    assert f"The server is ready: https://127.0.0.1:{machine.port}" in ran.stdout
    ran = machine.start(**files | {"OMNISPEECH_TLS_KEY": "/etc/a.key"})
    assert ran.returncode == 1 and "'/etc/a.key'; the server in the container reads" in ran.stderr


def without(machine: Machine, what: str) -> None:
    if what == "docker":
        (machine.programs / "docker").unlink()
    elif what == "driver":
        machine.program("nvidia-smi", "exit 9")
    elif what == "runtime":
        machine.says("info", '{"runc":{}} []')
    else:
        machine.says("no-daemon", what)


@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        ("docker", "Docker is not installed: https://docs.docker.com"),
        ("Cannot connect to the Docker daemon", "sudo systemctl start docker"),
        ("permission denied while trying to connect", 'usermod -aG docker "$USER"'),
        ("runtime", "nvidia-ctk runtime configure --runtime=docker"),
        ("driver", "no NVIDIA driver answers"),
    ],
)
def test_what_is_missing_is_named_with_what_brings_it(
    missing: str, advice: str, machine: Machine
) -> None:
    without(machine, missing)
    ran = machine.start()
    assert ran.returncode == 1
    assert advice in ran.stderr and "--local" in ran.stderr and "--cpu" in ran.stderr
    assert ran.stderr.count("  - ") == 1 and machine.called() == []


def test_all_that_is_missing_is_named_at_once(machine: Machine) -> None:
    without(machine, "docker")
    without(machine, "driver")
    ran = machine.start()
    assert "Docker is not installed" in ran.stderr and "NVIDIA driver" in ran.stderr


def test_a_port_of_another_program_is_refused_before_anything_changes(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", machine.port)):
        ran = machine.start()
    assert ran.returncode == 1 and machine.called() == []
    assert f"port {machine.port} is taken" in ran.stderr and "--port" in ran.stderr


def test_a_failed_build_leaves_the_old_server_alone(machine: Machine) -> None:
    machine.start()
    machine.says("build-fails")
    ran = machine.start()
    assert ran.returncode == 1 and "left alone" in ran.stderr
    assert machine.called() == ["build", "create", "start", "build"]


def test_what_docker_refuses_leaves_the_old_server_alone(machine: Machine) -> None:
    machine.start()
    machine.says("create-fails")
    ran = machine.start("--restart-policy", "perhaps")
    assert ran.returncode == 1 and "invalid restart policy" in ran.stderr
    assert "left alone" in ran.stderr.replace("\n", " ")
    assert machine.containers() == {"opens2s-server": True} and "stop" not in machine.called()


def test_a_container_that_does_not_start_is_removed(machine: Machine) -> None:
    machine.says("start-fails")
    ran = machine.start()
    assert ran.returncode == 1 and "cannot assign" in ran.stderr and "old" not in ran.stderr
    assert machine.containers() == {}


@pytest.mark.parametrize("running", [True, False])
def test_the_old_server_is_back_when_the_new_one_does_not_start(
    running: bool, machine: Machine
) -> None:
    machine.start()
    if not running:
        machine.start("--stop")
    machine.says("start-fails")
    ran = machine.start("--listen", "192.0.2.1", "--no-key")
    assert ran.returncode == 1 and "cannot assign" in ran.stderr
    assert ("the old one runs again" in ran.stderr) == running
    assert machine.containers() == {"opens2s-server": running}


def test_what_a_call_left_that_was_cut_short_is_removed(machine: Machine) -> None:
    for name in ("new", "old"):
        machine.says(f"container-opens2s-server-{name}", '{"running": "false"}')
    assert machine.start().returncode == 0
    assert machine.containers() == {"opens2s-server": True}


def test_a_server_that_another_call_started_meanwhile_is_left_alone(machine: Machine) -> None:
    machine.says("started-meanwhile")
    ran = machine.start("--quantize")
    assert ran.returncode == 1 and "another call has started a server" in ran.stderr
    assert machine.containers()["opens2s-server"] and "start" not in machine.called()


def test_a_container_that_goes_while_it_starts_is_missed(machine: Machine) -> None:
    machine.says("gone")
    ran = machine.start()
    assert ran.returncode == 1 and "the container is gone" in ran.stderr


def test_a_server_that_ends_is_told_with_the_end_of_its_log(machine: Machine) -> None:
    machine.says("dies", "3")
    ran = machine.start()
    assert ran.returncode == 1
    assert "the last words" in ran.stderr and "ended with status 3" in ran.stderr
    assert machine.called()[-1] == "stop"  # or it would be started again and again
    assert "--quantize" not in ran.stderr


def test_a_gpu_too_small_for_the_published_model_is_thought_of(machine: Machine) -> None:
    (machine.home / "models/OpenS2S").mkdir(parents=True)
    machine.says("dies", "1")
    assert "./build_and_run.sh --quantize" in machine.start().stderr


def test_what_is_to_be_quantized_is_fetched_first(machine: Machine) -> None:
    assert machine.start("--quantize").returncode == 0
    runs = [call for call in machine.calls if call[0] == "run"]
    assert runs[0][-2:] == ["omnispeech", "fetch"] and runs[1][-1].endswith("quantize_llm_awq.py")


def test_quantizing_has_the_gpu_to_itself(machine: Machine) -> None:
    (machine.home / "models/OpenS2S").mkdir(parents=True)
    machine.start()
    ran = machine.start("--quantize")
    assert ran.returncode == 0, ran.stderr
    assert machine.called()[3:] == ["build", "create", "stop", "run", "start"]
    [quantizer] = [call for call in machine.calls if call[0] == "run"]
    assert quantizer[-2:] == ["python3", "/app/quantize_llm_awq.py"] and "--rm" in quantizer
    left = next(call for call in machine.calls if call[:2] == ["rm", "--force"])
    assert left[-1] == "opens2s-server-quantizer" == quantizer[quantizer.index("--name") + 1]
    for option in ("--gpus", "--user", "--volume"):
        assert quantizer[quantizer.index(option) + 1] == machine.value(option)


def test_the_server_is_back_when_quantizing_has_failed(machine: Machine) -> None:
    machine.says("quantizer-fails")
    ran = machine.start("--quantize")
    assert ran.returncode == 1 and "was not quantized" in ran.stderr
    assert "The server is ready" in ran.stdout


def test_ctrl_c_while_quantizing_starts_no_server(machine: Machine) -> None:
    machine.says("quantizer-fails", "130")
    ran = machine.start("--quantize")
    assert ran.returncode == 1 and "no server is running now" in ran.stderr
    assert "start" not in machine.called()


def test_a_controller_is_told_where_this_server_is(machine: Machine) -> None:
    address = ("--worker-address", "http://10.0.0.2:8000")
    ran = machine.start("--controller", "http://10.0.0.9:21001", *address)
    assert ran.returncode == 0, ran.stderr
    assert "OMNISPEECH_CONTROLLER=http://10.0.0.9:21001" in machine.environment()
    assert "OMNISPEECH_WORKER_ADDRESS=http://10.0.0.2:8000" in machine.environment()
    assert [word for word in machine.made if "21001" in word and "--env" not in word] == [
        "OMNISPEECH_CONTROLLER=http://10.0.0.9:21001"
    ]  # no port of it is published


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--controller", "http://10.0.0.9:21001"), "--worker-address"),
        (
            ("--controller", "http://localhost:21001", "--worker-address", "http://a:8000"),
            "host.docker.internal",
        ),
        (("--device", "cuda"), "--device does nothing without --local"),
        (("--once",), "--once does nothing without --local"),
        (("--local", "--small"), "--small does nothing with --local"),
        (("--local", "--gpus", "all"), "--gpus does nothing with --local"),
        (("--cpu", "--gpus", "all"), "contradict"),
        (("--gpus",), "--gpus needs a value"),
        (("--port", "x"), "allowed: 1 to 65535"),
        (("--models", "a:b"), "no path with a colon"),
        (("--listen", "[::1]"), "an IPv4 address"),
        (("--listen", "localhost"), "an IPv4 address"),
    ],
)
def test_what_has_no_effect_is_refused(
    arguments: tuple[str, ...], words: str, machine: Machine
) -> None:
    ran = machine.start(*arguments)
    assert ran.returncode == 1 and words in ran.stderr and machine.calls == []


def test_stop_stops_the_container_and_keeps_it(machine: Machine) -> None:
    machine.start()
    assert machine.start("--stop").stdout == "stopped\n"
    assert machine.start("--stop").stdout == "no server was running\n"
    assert machine.called() == ["build", "create", "start", "stop"]
