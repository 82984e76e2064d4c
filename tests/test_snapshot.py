"""`omnispeech snapshot check`, and that what it calls settled starts elsewhere without a write."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from settled_models import AWQ, NAMES, state, write_settled

from omnispeech import caches
from omnispeech.checkpoint.manifest import FILE_NAME, Manifest
from omnispeech.cli import main
from omnispeech.deployment import snapshot

HERE = Path(__file__).parent
DECODER = "glm-4-voice-decoder"

pytestmark = pytest.mark.usefixtures("no_settings")


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_settled(tmp_path_factory.mktemp("snapshot") / "models")


@pytest.fixture
def models(settled: Path, tmp_path: Path) -> Path:
    """A copy that keeps times, as a snapshot does."""
    return Path(shutil.copytree(settled, tmp_path / "models"))


def check(
    models: Path, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, list[dict[str, Any]]]:
    status = main(["snapshot", "check", "--models", str(models), "--json", *flags])
    told = json.loads(capsys.readouterr().out)
    assert told["good"] == (status == 0)
    return status, told["findings"]


def wrong(findings: list[dict[str, Any]]) -> list[str]:
    return [finding["words"] for finding in findings if finding["level"] == "wrong"]


@pytest.mark.parametrize("llm", ["auto", "bf16", "awq"])
def test_what_is_settled_has_status_0(
    settled: Path, llm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(settled, capsys, "--llm", llm)[0] == 0


def test_commands_hold_for_a_directory_with_spaces(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = models.rename(models.with_name("my models"))
    (place / FILE_NAME).unlink()
    (place / f"{AWQ}.partial").mkdir()
    assert set(re.findall(r"--models (.*?models)", " ".join(wrong(check(place, capsys)[1])))) == {
        f"'{place}"
    }


def test_it_says_so_in_the_last_line(settled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["snapshot", "check", "--models", str(settled)])
    assert capsys.readouterr().out.endswith("an image taken now starts at once\n")


def unsettle_killed_copy(models: Path) -> str:
    (models / f"{AWQ}.prepared-0123456789ab.partial").mkdir()
    return f"{AWQ}.prepared-0123456789ab.partial: wait for the start that writes it, or delete it"


def unsettle_partial(models: Path) -> str:
    (models / "OpenS2S-8bit.partial").mkdir()
    return f"OpenS2S-8bit.partial: go on with: python quantize_model_once.py --models {models}"


def unsettle_fetch(models: Path) -> str:
    (models / f"{DECODER}.partial").mkdir()
    return f"go on with: omnispeech fetch {DECODER} --models {models}"


def unsettle_incomplete(models: Path) -> str:
    folder = models / "OpenS2S" / ".cache" / "huggingface" / "download"
    folder.mkdir(parents=True)
    (folder / "abc.incomplete").touch()
    return "abc.incomplete: wait for what writes it"


def unsettle_manifest(models: Path) -> str:
    (models / FILE_NAME).unlink()
    return f"{AWQ} is not in {FILE_NAME}; check and enter it with: omnispeech verify"


def unsettle_original(models: Path) -> str:
    raw = json.loads((models / FILE_NAME).read_text())
    del raw["entries"]["OpenS2S"]
    (models / FILE_NAME).write_text(json.dumps(raw))
    return f"OpenS2S is not in {FILE_NAME}; check and enter it with: omnispeech verify"


def unsettle_bytes(models: Path) -> str:
    path = models / AWQ / "config.json"
    path.write_text(path.read_text() + " ")
    return "bytes instead of"


def unsettle_times(models: Path) -> str:
    os.utime(models / AWQ / "config.json", ns=(1, 1))
    return f"or copied, since (to compare every byte: omnispeech verify --models {models} {AWQ})"


def unsettle_directory(models: Path) -> str:
    shutil.rmtree(models / AWQ)
    return f"to make it again: python quantize_llm_awq.py --models {models}"


def unsettle_conversion(models: Path) -> str:
    entry = Manifest(models).entry(DECODER)
    files = {name: record for name, record in entry.files.items() if name.endswith(".pt")}
    Manifest(models).enter(DECODER, {}, files)  # conversions do not belong to what was fetched
    (models / DECODER / "flow.safetensors").unlink()
    return "flow.pt (1"


def unsettle_copy(models: Path) -> str:
    for path in models.glob(f"{AWQ}.prepared-*"):
        shutil.rmtree(path)
        Manifest(models).forget(path.name)
    return f"{AWQ} will be repacked for this machine, once; start it once with"


def unsettle_original_missing(models: Path) -> str:
    shutil.rmtree(models / "OpenS2S")
    return "omnispeech fetch OpenS2S"


def unsettle_cache(models: Path) -> str:
    path = models / ".cache" / "gpu-x" / "triton" / "kernel.cubin"
    path.parent.mkdir(parents=True)
    path.touch()
    return "kernel.cubin was written less than 10 s ago"


UNSETTLED = [value for name, value in list(globals().items()) if name.startswith("unsettle_")]


@pytest.mark.parametrize("unsettle", UNSETTLED, ids=lambda f: f.__name__)
def test_what_is_not_settled_is_listed_and_nothing_is_written(
    models: Path, unsettle: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = unsettle(models)
    before = state(models)
    status, findings = check(models, capsys)
    assert status == 1
    assert any(expected in words for words in wrong(findings)), wrong(findings)
    assert state(models) == before


@pytest.mark.parametrize("name", ["OpenS2S-llm-gptq.partial", f".{FILE_NAME}.lock", "fetch.lock"])
def test_what_another_process_holds_is_running(
    models: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = models / name
    path.mkdir() if name.endswith(".partial") else path.touch()
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert any("is locked" in words for words in wrong(check(models, capsys)[1]))
    os.close(descriptor)
    assert not any("is locked" in words for words in wrong(check(models, capsys)[1]))


def test_without_a_quantized_llm_there_is_a_note_unless_it_is_asked_for(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(models / AWQ)
    Manifest(models).forget(AWQ)
    status, findings = check(models, capsys)
    assert status == 0
    assert any("No AWQ-quantized LLM found" in f["words"] for f in findings)
    status, findings = check(models, capsys, "--llm", "awq")
    assert status == 1
    assert any(f"{AWQ} is missing; make it with" in words for words in wrong(findings))


def test_a_gpu_on_which_nothing_has_run_is_not_settled(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(caches, "cache_key", lambda: "gpu-x")
    assert "no server has started here with this GPU" in wrong(check(models, capsys)[1])[0]
    caches.use_caches(models, {})
    assert check(models, capsys)[0] == 0


@pytest.mark.parametrize("age_s", [60, -3600], ids=["before", "by a clock that was set back"])
def test_old_caches_are_settled(
    models: Path, age_s: float, capsys: pytest.CaptureFixture[str]
) -> None:
    path = models / ".cache" / "kernel"
    path.parent.mkdir()
    path.touch()
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    assert check(models, capsys)[0] == 0


def test_what_waits_to_be_written_is_noted(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("Dirty:  900000 kB\nWriteback:   100000 kB\n")
    (note,) = snapshot.unsynced(tmp_path)
    assert note.level == "note" and "1.02 GB wait" in note.words
    (tmp_path / "meminfo").write_text("Dirty:  900 kB\nWriteback:   1 kB\n")
    assert not list(snapshot.unsynced(tmp_path))


def test_sizes_are_those_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(os.urandom(1 << 20))
    os.link(tmp_path / "a" / "file", tmp_path / "a" / "again")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "file")
    shown = subprocess.run(["du", "-s", "-B1", tmp_path / "a"], capture_output=True, text=True)
    assert snapshot.disk_size(tmp_path / "a") == int(shown.stdout.split()[0])


def test_no_models_directory_is_not_settled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path / "none", capsys)[0] == 1


# what is settled starts elsewhere


class Start:
    """`watched_server.py` until it is ready, then stopped; what it logged and wrote."""

    def __init__(self, models: Path, record: Path, *flags: str) -> None:
        quick = ("--max-conversations", "1", "--context-length", "2048", "--kv-tokens", "2048")
        command = [sys.executable, "watched_server.py", record, "--models", models, "--port", "0"]
        environ = {name: v for name, v in os.environ.items() if name not in caches.VARIABLES}
        self.process = subprocess.Popen(
            [*map(str, command), "--device", "cpu", *quick, *flags],
            cwd=HERE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONDONTWRITEBYTECODE": "1"},
        )
        self.log = ""
        with self.process as process:
            assert process.stdout is not None
            for line in process.stdout:
                self.log += line
                if found := re.search(r"running on (http://\S+)", line):
                    self._wait(found[1])
        self.status = process.returncode
        self.events = [json.loads(line) for line in record.read_text().splitlines()]

    def _wait(self, url: str) -> None:
        with suppress(httpx.TransportError):  # a server that ends has said why
            while httpx.get(f"{url}/ready").status_code != 200:
                time.sleep(0.05)
        self.process.send_signal(signal.SIGTERM)

    def writes(self, below: Path) -> list[str]:
        """Events that name a path below that is no cache."""
        inside = [e for e in self.events if any(v.startswith(str(below)) for v in e[1:])]
        return [str(event) for event in inside if f"{below}/.cache" not in str(event)]

    @property
    def connections(self) -> list[str]:
        return [str(e) for e in self.events if e[0].startswith("socket.")]


@pytest.mark.parametrize("llm", ["bf16", "awq"])
def test_a_copy_starts_on_another_machine_without_network_and_without_a_write(
    settled: Path, tmp_path: Path, llm: str
) -> None:
    models = Path(shutil.copytree(settled, tmp_path / "elsewhere" / "models"))
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    before = state(models)
    start = Start(models, tmp_path / "record", "--llm", llm)
    assert start.status == 0, start.log
    assert "warm up" in start.log
    kept = f"AWQ-quantized LLM from {models / AWQ}"
    assert (kept in start.log) == (llm == "awq")
    assert start.writes(models) == [] and start.connections == []
    assert state(models) == before


def test_a_copy_with_other_times_starts_and_is_settled_afterwards(
    settled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = Path(shutil.copytree(settled, tmp_path / "models", copy_function=shutil.copyfile))
    start = Start(models, tmp_path / "record")
    assert start.status == 0, start.log
    assert f"comparing every byte of {AWQ}" in start.log
    written = {json.loads(e.replace("'", '"'))[0] for e in start.writes(models)}
    assert written and start.connections == []
    changed = {path for path in state(models) if (models / path).suffix in (".pt", ".json")}
    assert changed  # the manifest and the conversion are new, the models are not
    Manifest(models).check(AWQ)


def test_a_start_writes_what_a_start_writes(settled: Path, tmp_path: Path) -> None:
    """The watching sees a conversion: else its silence would prove nothing."""
    models = Path(shutil.copytree(settled, tmp_path / "models"))
    (models / DECODER / "flow.safetensors").unlink()
    start = Start(models, tmp_path / "record", "--llm", "bf16")
    assert any("flow.safetensors" in event for event in start.writes(models))


def test_nothing_in_a_models_directory_names_the_machine(settled: Path) -> None:
    import socket

    name = socket.gethostname().encode()
    texts = [p for p in settled.rglob("*") if p.suffix in (".json", ".yaml", ".log")]
    assert texts and all(name not in path.read_bytes() for path in texts)
    assert all(str(settled).encode() not in path.read_bytes() for path in texts)
    assert set(NAMES) < set(Manifest(settled).names())
