"""Where compilers keep what they made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from omnispeech import caches
from omnispeech.caches import VARIABLES, cache_directory, cache_key, use_caches

VERSION = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024
GCC version:  gcc version 12.2.0
"""
OPEN_VERSION = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build
"""


def machine(proc: Path, *gpus: str, version: str = VERSION) -> Path:
    """The files of a machine with these GPUs, or with a processor alone."""
    proc.mkdir(exist_ok=True)
    (proc / "cpuinfo").write_text("processor : 0\nmodel name\t: AMD EPYC 9004 (TM)\n")
    if gpus:
        (proc / "driver/nvidia").mkdir(parents=True)
        (proc / "driver/nvidia/version").write_text(version)
    for i, name in enumerate(gpus):
        folder = proc / f"driver/nvidia/gpus/0000:0{i}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 24\n")
    return proc


@pytest.fixture(autouse=True)
def no_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches.shutil, "which", lambda _: None)
    monkeypatch.setattr(caches, "_version", {"torch": "2.13.0+cu130", "triton": "3.7.0"}.get)


def use_key(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr(caches, "cache_key", lambda: key)


def test_the_key_names_gpu_driver_and_versions(tmp_path: Path) -> None:
    key = cache_key(machine(tmp_path, "NVIDIA L4", "NVIDIA L4"))
    assert key == "gpu-nvidia-l4-driver-550.54.15-torch-2.13.0-cu130-triton-3.7.0"


def test_the_key_of_the_open_driver_has_its_version(tmp_path: Path) -> None:
    assert "driver-570.86.10-" in cache_key(machine(tmp_path, "NVIDIA L4", version=OPEN_VERSION))


def test_another_gpu_or_version_has_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {cache_key(machine(tmp_path / gpu, gpu)) for gpu in ("L4", "H100")}
    monkeypatch.setattr(caches, "_version", {"torch": "2.14.0"}.get)
    assert len(keys | {cache_key(tmp_path / "L4")}) == 3


def test_without_a_gpu_the_key_names_the_processor(tmp_path: Path) -> None:
    assert cache_key(machine(tmp_path)).startswith("cpu-amd-epyc-9004-tm-torch-2.13.0")
    assert cache_key(tmp_path / "nothing").startswith("cpu-unknown-torch-")


def test_where_files_of_the_driver_are_hidden_nvidia_smi_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = subprocess.CompletedProcess([], 0, stdout="NVIDIA A100-SXM4, 80GB, 535.1\n")
    monkeypatch.setattr(caches.shutil, "which", lambda name: name)
    monkeypatch.setattr(caches.subprocess, "run", lambda *_, **__: answer)
    assert cache_key(machine(tmp_path)).startswith("gpu-nvidia-a100-sxm4-80gb-driver-535.1-torch")


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 1)])
def test_an_nvidia_smi_that_fails_means_no_gpu(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(caches.shutil, "which", lambda name: name)
    monkeypatch.setattr(caches.subprocess, "run", fail)
    assert cache_key(machine(tmp_path)).startswith("cpu-")


def test_every_compiler_is_told_a_place_of_its_own(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    use_caches(tmp_path, environ)
    assert environ.keys() == VARIABLES.keys()
    places = {Path(place) for place in environ.values()}
    assert len(places) == len(VARIABLES)
    assert {place.parent for place in places} == {cache_directory(tmp_path)}


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    environ = {"TRITON_CACHE_DIR": "/elsewhere"}
    use_caches(tmp_path, environ)
    assert environ["TRITON_CACHE_DIR"] == "/elsewhere"
    assert environ["CUDA_CACHE_PATH"].startswith(str(tmp_path))


def test_a_models_directory_that_cannot_be_written_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_key(monkeypatch, "cpu-x")
    monkeypatch.setattr(os, "access", lambda *_: False)  # who runs as root may write anywhere
    environ: dict[str, str] = {}
    use_caches(tmp_path, environ)
    assert environ == {} and not list(tmp_path.iterdir())


def test_no_models_directory_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_key(monkeypatch, "gpu-x")
    use_caches(tmp_path / "misspelt", {})
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_made_does_not_end_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_key(monkeypatch, "gpu-x")
    (tmp_path / ".cache").write_text("in the way")
    environ: dict[str, str] = {}
    with caplog.at_level("INFO"):
        use_caches(tmp_path, environ)
    assert environ == {} and "no caches in" in caplog.text


@pytest.mark.parametrize(("key", "made"), [("gpu-x", True), ("cpu-x", False)])
def test_only_a_gpu_gets_a_directory_at_once(
    tmp_path: Path, key: str, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_key(monkeypatch, key)
    use_caches(tmp_path, {})
    assert (tmp_path / ".cache" / key).is_dir() == made


BUILDS = """
import os, sys
from omnispeech import service
from omnispeech.caches import use_caches
from omnispeech.errors import OmniSpeechError

def watched(models):
    seen.append("torch" in sys.modules)
    use_caches(models)

seen = []
service.use_caches = watched
try:
    service.build_worker(service.read_settings({"models": sys.argv[1]}))
except OmniSpeechError as error:
    assert "is missing" in str(error)
assert seen == [False], seen
assert os.environ["TRITON_CACHE_DIR"].startswith(sys.argv[1])
"""


def test_the_caches_are_named_before_torch_is_there(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", BUILDS, str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert not done.returncode, done.stderr
