"""Dockerfile, .dockerignore, compose.yaml, deploy/: what can be known without building anything."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from access_keys import ALICE, key_file, make_certificate, whole_server

from omnispeech.config import AccessConfig, ServerConfig, StartConfig
from omnispeech.server.access.keys import VARIABLE, Keys
from omnispeech.small.directory import NAMES, shipped

ROOT = Path(__file__).parent.parent
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
KEPT_OUT = ("tests/test_cli.py", ".git/config", ".venv/bin/python", ".local/models", "docs/a.md")
DOWNLOAD = 22e9  # bytes of a first start
SLOWEST = 4e6  # bytes a second that it may come with
drain_s = next(f.default for f in fields(ServerConfig) if f.name == "drain_s")


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} (.+)$", DOCKERFILE, re.MULTILINE)


def copied() -> list[str]:
    """Paths of the project that the Dockerfile copies."""
    lines = [line.split()[:-1] for line in instructions("COPY") if "--from" not in line]
    return [path for line in lines for path in line]


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path through: the last pattern that fits it decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = [path, *map(str, Path(path).parents), *(Path(path).parts if "**" in line else ())]
        if line and not line.startswith("#") and any(fnmatch(part, pattern) for part in parts):
            sent = line.startswith("!")
    return sent


def stages() -> list[str]:
    return [line.split(" AS ")[1] for line in instructions("FROM")]


def test_everything_that_is_copied_is_there_and_sent_to_the_builder() -> None:
    paths = copied()
    assert len(paths) > 8
    assert [path for path in paths if not (ROOT / path).exists() or not is_sent(path)] == []


def test_the_small_model_is_in_the_image() -> None:
    files = [path for name in NAMES for path in shipped(name).values()]
    paths = [path.relative_to(ROOT).as_posix() for path in files]
    assert len(paths) > 10 and all(map(is_sent, paths))
    assert "omnispeech" in copied()  # its wheel takes them: test_small_model.py


@pytest.mark.parametrize("path", [*KEPT_OUT, "omnispeech/__pycache__/cli.cpython-311.pyc"])
def test_what_is_no_part_of_the_product_stays_outside(path: str) -> None:
    assert not is_sent(path)


def test_no_file_is_sent_that_is_not_copied() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert sorted(line[1:] for line in lines if line.startswith("!")) == sorted(copied())


def test_the_base_can_be_chosen_and_is_pinned() -> None:
    assert instructions("ARG")[0].startswith("BASE_IMAGE=")
    assert re.search(r":\S*\d", instructions("ARG")[0])
    assert instructions("FROM")[0] == "${BASE_IMAGE} AS python"
    assert all(line.split(" AS ")[0] in stages() for line in instructions("FROM")[1:])


def test_every_package_of_the_image_is_pinned() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    assert names and all(re.fullmatch(r"[\w.\[\]-]+==[\w.]+", name) for name in names)
    installed = re.findall(r"pip install ((?:--\S+ )*)(\S+)", DOCKERFILE)
    assert {what for _, what in installed} == {"${TORCH_INDEX:+--extra-index-url", "-r", "/build"}


def test_the_server_is_built_unless_the_quantizer_is_asked_for() -> None:
    assert stages()[-2:] == ["quantizer", "server"]


def test_programs_are_started_without_a_shell_that_would_keep_signals() -> None:
    for line in (*instructions("ENTRYPOINT"), *instructions("CMD")):
        assert isinstance(yaml.safe_load(line), list), line


def test_no_model_and_no_secret_is_in_the_image() -> None:
    assert not re.search(r"TOKEN|safetensors|OpenS2S|\bfetch\b", DOCKERFILE)


# ---- whether the server answers


def ask_answers(path: str, port: int, **variables: str) -> int:
    environ = {"OMNISPEECH_PORT": str(port), "PATH": os.environ["PATH"]} | variables
    command = [sys.executable, str(ROOT / "deploy/answers"), path]
    return subprocess.run(command, env=environ, capture_output=True, timeout=30).returncode


def test_the_container_knows_whether_its_server_answers() -> None:
    with whole_server(AccessConfig()) as port:
        assert ask_answers("/health", port) == 0
        assert ask_answers("/none", port) == 1
    assert ask_answers("/health", port) == 1


def test_it_knows_so_of_https_too(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    certificate, key = tmp_path / "here.pem", tmp_path / "here.key"
    make_certificate(certificate, key)
    with whole_server(AccessConfig(tls_certificate=str(certificate), tls_key=str(key))) as port:
        assert ask_answers("/ready", port, OMNISPEECH_TLS_CERTIFICATE=str(certificate)) == 0
        assert ask_answers("/ready", port) == 1


def test_the_health_of_the_container_is_asked_so() -> None:
    assert 'CMD ["answers", "/health"]' in instructions("HEALTHCHECK")[0]
    assert os.access(ROOT / "deploy/answers", os.X_OK)


# ---- the owner of the models


def as_owner(tmp_path: Path, user: int, owner: int) -> str:
    """What the entry point runs, as user `user`, where the models belong to `owner`."""
    for name, line in {
        "id": f"echo {user}",
        "stat": f'case "$*" in "-Lc %u "*) echo {owner};; "-Lc %g "*) echo {owner + 1};; esac',
        "setpriv": 'echo "setpriv $*"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OMNISPEECH_MODELS": str(tmp_path)}
    command = [str(ROOT / "deploy/as-owner"), "echo", "ran", "a b"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout


def test_root_becomes_the_owner_of_the_models(tmp_path: Path) -> None:
    said = as_owner(tmp_path, 0, 1000)
    assert said == "setpriv --reuid 1000 --regid 1001 --clear-groups echo ran a b\n"


@pytest.mark.parametrize(("user", "owner"), [(0, 0), (1000, 0), (1000, 1001)])
def test_otherwise_the_user_stays(user: int, owner: int, tmp_path: Path) -> None:
    assert as_owner(tmp_path, user, owner) == "ran a b\n"


# ---- Compose and Kubernetes


def compose() -> dict[str, Any]:
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text)["services"]["server"])


def kubernetes(kind: str) -> dict[str, Any]:
    text = (ROOT / "deploy/kubernetes.yaml").read_text(encoding="utf-8")
    return next(dict(one) for one in yaml.safe_load_all(text) if one["kind"] == kind)


def pod() -> dict[str, Any]:
    return dict(kubernetes("Deployment")["spec"]["template"]["spec"])


def test_compose_has_one_gpu_the_models_and_time_to_drain() -> None:
    server = compose()
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert server["container_name"] == "opens2s-server" and server["init"] is True
    assert server["build"]["target"] in stages()
    (volume,) = server["volumes"]
    assert volume["target"] == "/models" and volume["bind"] == {"create_host_path": False}
    assert float(server["stop_grace_period"].removesuffix("s")) > drain_s + 5
    assert server["ports"][0].startswith("${LISTEN:-127.0.0.1}:")


def test_variables_that_compose_hands_on_are_settings() -> None:
    settings = {f"OMNISPEECH_{f.name.upper()}" for f in all_settings()}
    names = [name for name in compose()["environment"] if name.startswith("OMNISPEECH_")]
    assert set(names) <= settings | {VARIABLE}


def all_settings() -> list[Any]:
    from omnispeech.config_reader import CONFIGS

    return [f for config in (*CONFIGS, StartConfig) for f in fields(config)]


def test_compose_hands_on_that_the_small_model_is_enough() -> None:
    assert "OMNISPEECH_SMALL" in compose()["environment"]


def test_compose_hands_on_who_may_come_in_and_https() -> None:
    names = {"API_KEY", "API_KEYS", "TLS_CERTIFICATE", "TLS_KEY"}  # docs/security.md
    assert {f"OMNISPEECH_{name}" for name in names} <= set(compose()["environment"])


@pytest.mark.skipif(shutil.which("docker") is None, reason="needs docker")
def test_docker_compose_takes_the_file() -> None:
    there = subprocess.run(["docker", "compose", "version"], capture_output=True)
    if there.returncode:
        pytest.skip("needs the compose plugin")
    command = ["docker", "compose", "--file", str(ROOT / "compose.yaml"), "config", "--quiet"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_kubernetes_gives_one_gpu_and_never_two_servers_to_it() -> None:
    deployment = kubernetes("Deployment")["spec"]
    assert deployment["strategy"] == {"type": "Recreate"} and deployment["replicas"] == 1
    (server,) = pod()["containers"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1
    mounted = {mount["mountPath"]: mount["name"] for mount in server["volumeMounts"]}
    volume = next(v for v in pod()["volumes"] if v["name"] == mounted["/models"])
    claim = kubernetes("PersistentVolumeClaim")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) >= 60


def test_the_keys_of_a_pod_are_a_secret() -> None:
    (server,) = pod()["containers"]
    [variable] = [one for one in server["env"] if one["name"] == "OMNISPEECH_API_KEYS"]
    place, _, file = variable["value"].rpartition("/")
    mounted = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    volume = next(v for v in pod()["volumes"] if v["name"] == mounted[place]["name"])
    assert mounted[place]["readOnly"] is True and volume["secret"]["defaultMode"] == 0o440
    text = (ROOT / "deploy/kubernetes.yaml").read_text(encoding="utf-8")
    name = volume["secret"]["secretName"]
    assert f"kubectl create secret generic {name} --from-file={file}" in text


def test_a_file_of_a_secret_is_not_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = key_file(tmp_path, alice=ALICE)
    path.chmod(0o440)
    assert Keys(path).needed and caplog.text == ""


def test_a_pod_may_take_as_long_as_the_first_download() -> None:
    (server,) = pod()["containers"]
    start, ready, live = (server[f"{name}Probe"] for name in ("startup", "readiness", "liveness"))
    assert start["httpGet"]["path"] == ready["httpGet"]["path"] == "/ready"
    assert live["httpGet"]["path"] == "/health"
    allowed = start["periodSeconds"] * start["failureThreshold"]
    assert allowed > DOWNLOAD / SLOWEST
    assert kubernetes("Deployment")["spec"]["progressDeadlineSeconds"] > allowed


def test_a_pod_that_goes_finishes_its_replies() -> None:
    (server,) = pod()["containers"]
    pause = float(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod()["terminationGracePeriodSeconds"] > pause + drain_s + 5


def test_a_pod_has_no_more_rights_than_it_needs() -> None:
    (server,) = pod()["containers"]
    context = pod()["securityContext"]
    assert context["runAsNonRoot"] is True and context["runAsUser"] > 0
    assert context["fsGroup"] == context["runAsGroup"]  # the volume is its own
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod()["automountServiceAccountToken"] is False


def test_no_service_makes_variables_that_look_like_settings() -> None:
    """Of a service `omnispeech`, Kubernetes makes OMNISPEECH_PORT=tcp://10.0.0.1:8000."""
    assert pod()["enableServiceLinks"] is False


def test_the_service_finds_the_pods() -> None:
    labels = kubernetes("Deployment")["spec"]["template"]["metadata"]["labels"]
    service = kubernetes("Service")["spec"]
    assert service["selector"].items() <= labels.items()
    ports = [port["name"] for port in pod()["containers"][0]["ports"]]
    assert service["ports"][0]["targetPort"] in ports
