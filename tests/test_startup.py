"""`startup.py`: what it brings, what it refuses, and that it becomes the worker."""

import errno
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from download_models import befall, found
from hub_server import Hub, serving, wait_until

import omnispeech.startup
from omnispeech import cli
from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import choose_sources
from omnispeech.errors import OmniSpeechError
from omnispeech.small.directory import is_as_shipped, write_small
from omnispeech.tiny.directory import write_tiny

ROOT = Path(__file__).parent.parent
READY = "✅ All 2 models are ready!"
NAMES = ("OpenS2S", "glm-4-voice-decoder")
SHARD = "model-00001-of-00002.safetensors"
PROGRAMS: list["subprocess.Popen[str]"] = []


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small models, as they are published."""
    place = tmp_path_factory.mktemp("published")
    write_tiny(place)
    return place


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in [name for name in os.environ if name.startswith(("OMNISPEECH_", "HF_"))]:
        monkeypatch.delenv(name)
    repositories = ("CASIA-LM/OpenS2S", "THUDM/glm-4-voice-decoder")
    files = {repo: found(published / repo.partition("/")[2]) for repo in repositories}
    with serving(Hub(files)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def models(published: Path, tmp_path: Path) -> Path:
    """Entered, and not converted."""
    place = tmp_path / "models"
    shutil.copytree(published, place)
    return place


@pytest.fixture
def by_hand(models: Path) -> Path:
    """The same without a manifest, as `cp` or `hf download` leave it."""
    Manifest(models).path.unlink()
    return models


@pytest.fixture
def converted(models: Path) -> Path:
    """With the decoder converted, as after a first start."""
    load_decoder(models / NAMES[1])
    return models


class Replaced(Exception):
    """The process would be another one now."""

    @property
    def command(self) -> list[str]:
        return list(self.args[0])


def become(path: str, command: list[str]) -> None:
    raise Replaced(command)


def start(models: Path, *flags: str, caplog: pytest.LogCaptureFixture | None = None) -> list[str]:
    """The command that the process becomes; OmniSpeechError where it refuses."""
    parser = cli.argparse.ArgumentParser(allow_abbrev=False)
    given = ["--models", str(models), "--port", "0", *flags]
    omnispeech.startup.add_arguments(parser, given, ROOT)
    args = parser.parse_args(given)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "execv", become)
        try:
            args.run(args)
        except Replaced as replaced:
            return replaced.command
        finally:
            signal.signal(signal.SIGTERM, before)
    raise AssertionError("it became nothing")


def test_an_empty_directory_becomes_a_whole_one_and_the_process_the_worker(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    models = tmp_path / "models"
    command = start(models, "--llm", "auto", "--connections", "2", "--max-waiting", "3")
    assert command[:2] == [sys.executable, str(ROOT / "model_worker.py")]
    assert command[2:] == [
        *("--models", str(models), "--port", "0", "--llm", "auto", "--max-waiting", "3")
    ]
    assert caplog.messages[-1] == READY
    assert choose_sources(models).decoder == models / NAMES[1]
    assert {"flow.safetensors", "hift.safetensors"} <= found(models / NAMES[1]).keys()
    for name in NAMES:
        Manifest(models).check(name, deep=True)


def test_a_start_that_finds_everything_asks_nothing_and_writes_nothing(
    hub: Hub, models: Path
) -> None:
    start(models, "--llm", "auto")  # converts the decoder
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    start(models)
    assert {path: path.stat().st_mtime_ns for path in models.rglob("*")} == before
    assert not hub.requests


def test_a_start_that_finds_everything_is_quick_and_imports_no_torch(
    hub: Hub, converted: Path
) -> None:
    code = f"""
import os, sys, time
from pathlib import Path
from omnispeech.cli import startup
def become(path, command):
    print(time.process_time() - began, {{"torch", "huggingface_hub"}} & sys.modules.keys())
    sys.exit(0)
os.execv = become
import omnispeech.startup
began = time.process_time()
startup(Path("."), ["--models", {str(converted)!r}, "--port", "0"])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    seconds, modules = ran.stdout.splitlines()[-1].split(maxsplit=1)
    assert modules == "set()", ran.stderr
    assert float(seconds) < 0.3  # 0.01 on an idle machine


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-tokens", "1"], "kv_tokens=1 is less"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "tpu"], "'tpu' is no device"),
        (["--dtype", "int3"], "int3"),
        (["--kernel", "best"], "best"),
        (["--connections", "0"], "connections=0"),
        (["--hub-endpoint", "ftp://x"], "hub_endpoint='ftp://x'"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(OmniSpeechError, match=message):
        start(tmp_path, *flags)
    assert not hub.requests


@pytest.mark.parametrize(
    "endpoint", ["huggingface.co", "http://[::1", "http://127.0.0.1:99999", "ftp://x", " "]
)
def test_an_endpoint_that_is_none_is_refused_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(OmniSpeechError, match=r"HF_ENDPOINT='.*'; allowed: a URL"):
        start(tmp_path)


def test_a_flag_that_is_none_is_refused_with_status_2(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        start(tmp_path, "--modles", "x")
    assert not hub.requests


def test_a_port_in_use_is_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(OmniSpeechError, match=f"cannot listen on 127.0.0.1:{port}"):
            start(tmp_path, "--port", port)
    assert not hub.requests


def test_models_that_came_by_hand_are_entered_once_and_not_fetched(
    hub: Hub, by_hand: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (by_hand / "OpenS2S/.cache/huggingface").mkdir(parents=True)
    (by_hand / "OpenS2S/.cache/huggingface/x.metadata").write_text("left by hf download")
    start(by_hand)
    assert f"{by_hand / 'OpenS2S'} is complete and new here: hashing its " in caplog.text
    assert READY in caplog.messages and not hub.requests
    files = Manifest(by_hand).entry("OpenS2S").files
    assert "tts/tokenizer.json" in files and not any("cache" in file for file in files)
    assert set(Manifest(by_hand).entry(NAMES[1]).files) == {"config.yaml", "flow.pt", "hift.pt"}
    caplog.clear()
    start(by_hand)
    assert "hashing" not in caplog.text


def test_models_on_a_read_only_disk_are_used_as_they_are(
    hub: Hub, by_hand: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    start(by_hand)
    assert "is complete; it cannot be entered: read-only" in caplog.text
    assert not Manifest(by_hand).path.exists()


def test_an_incomplete_model_that_came_by_hand_is_named_with_the_command_that_mends_it(
    hub: Hub, by_hand: Path
) -> None:
    (by_hand / "OpenS2S" / SHARD).unlink()
    command = f"omnispeech fetch OpenS2S --models {by_hand}"
    with pytest.raises(OmniSpeechError, match=rf"lacks 1 of 2 shards: {SHARD}.*{command}"):
        start(by_hand)
    assert not hub.requests
    assert cli.main(command.split()[1:]) == 0
    assert {Path(path).name for path in hub.sent} == {SHARD}
    start(by_hand)


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "changed"])
def test_a_file_that_is_not_as_entered_is_named_with_the_command_that_mends_it(
    hub: Hub, tmp_path: Path, missing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path)
    path = tmp_path / "OpenS2S" / SHARD
    if missing:
        path.unlink()
    else:
        path.write_bytes(bytes(path.stat().st_size))
    hub.sent.clear()
    command = f"omnispeech fetch OpenS2S --models {tmp_path}"
    with pytest.raises(OmniSpeechError, match=rf"{path} is not as .*{command}"):
        start(tmp_path)
    assert not hub.sent
    assert cli.main(command.split()[1:]) == 0
    assert f"{tmp_path / 'OpenS2S'}: whole" in capsys.readouterr().out
    assert set(hub.sent) == {SHARD}
    start(tmp_path)


def test_the_command_that_mends_asks_the_hub_that_was_set(
    hub: Hub, by_hand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ENDPOINT")
    (by_hand / "OpenS2S" / SHARD).unlink()
    command = f"omnispeech fetch OpenS2S --models {by_hand} --hub-endpoint {hub.url}"
    with pytest.raises(OmniSpeechError, match=f"to mend it: {command}"):
        start(by_hand, "--hub-endpoint", hub.url)
    assert cli.main(command.split()[1:]) == 0


@pytest.mark.parametrize("size", [0, 10])
def test_one_instruction_is_given_for_a_file_that_changed(models: Path, size: int) -> None:
    (models / NAMES[1] / "flow.pt").write_bytes(bytes(size))
    command = f"omnispeech fetch {NAMES[1]} --models {models}"
    told = rf"instead of \d+ \(to mend it: {command}\)$"
    with pytest.raises(OmniSpeechError, match=told):
        start(models)


def test_a_manifest_that_is_damaged_is_made_anew_with_the_words_of_its_error(
    hub: Hub, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Manifest(converted).path.write_text("{")
    told = f"enter what is whole anew with: omnispeech verify --models {converted}"
    with pytest.raises(OmniSpeechError, match=f"move the file away, then {told}$"):
        start(converted)
    Manifest(converted).path.unlink()
    assert cli.main(told.partition("omnispeech ")[2].split()) == 0
    assert Manifest(converted).names() == sorted(NAMES)
    told = capsys.readouterr().out
    assert all(f"{name}: entered: headers fit" in told for name in NAMES)
    start(converted)
    assert not hub.requests


def test_verify_enters_no_half_of_a_model(
    by_hand: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (by_hand / "OpenS2S" / SHARD).unlink()
    assert cli.main(["verify", "--models", str(by_hand)]) == 1
    command = f"(to mend it: omnispeech fetch OpenS2S --models {by_hand})"
    assert f"not in the manifest and not whole {command}\n" in capsys.readouterr().out
    assert Manifest(by_hand).names() == [NAMES[1]]


def test_models_that_are_no_directory_are_told_before_anything_is_imported(
    hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "models").touch()
    with pytest.raises(OmniSpeechError, match="no directory; name a models directory: --models"):
        start(tmp_path / "models")
    assert not hub.requests


@pytest.mark.parametrize("flags", [[], ["--small"]], ids=["published", "small"])
def test_into_a_model_none_is_brought(
    hub: Hub, models: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = found(models)
    with pytest.raises(OmniSpeechError, match=f"one level too deep; use --models {models}$"):
        start(models / "OpenS2S", *flags)
    assert cli.main(["fetch", "--models", str(models / "OpenS2S")]) == 1
    assert f"one level too deep; use --models {models}\n" in capsys.readouterr().err
    assert found(models) == before and not hub.requests


def test_a_conversion_with_other_numbers_is_found_by_a_deep_verification(
    converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", "--models", str(converted), "--deep"]
    assert cli.main(command) == 0
    path = converted / NAMES[1] / "flow.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert cli.main(command) == 1
    assert f"{path} does not hold the tensors of flow.pt: delete it" in capsys.readouterr().out


def test_an_original_that_was_deleted_for_the_8_bit_model_is_not_fetched_again(
    hub: Hub, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (models / "OpenS2S").rename(models / "OpenS2S-8bit")
    start(models)
    assert f"OpenS2S is not fetched: {models / 'OpenS2S-8bit'} holds the whole model" in caplog.text
    assert caplog.messages[-1] == READY
    assert not hub.requests
    start(models, "--llm", "bf16")  # asked for by name
    assert (models / "OpenS2S" / SHARD).exists()


def test_offline_a_start_needs_its_files_and_nothing_else(
    hub: Hub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start(models)
    with pytest.raises(OmniSpeechError, match=r"OpenS2S has to be fetched, and HF_HUB_OFFLINE"):
        start(tmp_path / "empty")
    assert not hub.requests


def test_settings_that_name_another_repository_than_the_one_there_are_told(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path)
    start(tmp_path)
    assert "as set" not in caplog.text
    hub.requests.clear()
    start(tmp_path, "--opens2s-revision", "v2")
    assert (
        f"OpenS2S is from CASIA-LM/OpenS2S, revision main; for CASIA-LM/OpenS2S, revision v2, as "
        f"set: omnispeech fetch OpenS2S --models {tmp_path} --opens2s-revision v2 --update"
    ) in caplog.text
    assert not hub.requests
    shutil.rmtree(tmp_path / "OpenS2S")
    caplog.clear()
    with pytest.raises(OmniSpeechError, match="its revision 'v2'"):
        start(tmp_path, "--opens2s-revision", "v2")
    assert "as set" not in caplog.text  # what is gone is from nowhere


def test_a_wavlm_is_fetched_where_one_is_asked_for(
    hub: Hub, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    files = {"config.json": b"{}", "pytorch_model.bin": b"0" * 2000, "flax_model.msgpack": b"no"}
    hub.repositories["microsoft/wavlm-base-plus"] = files
    start(models, "--audio-encoder", "wavlm")
    del files["flax_model.msgpack"]
    assert found(models / "wavlm-base-plus") == files
    assert caplog.messages[-1] == "✅ All 3 models are ready!"


# ---- the small model


def holds_small(models: Path) -> bool:
    return all(is_as_shipped(models / name) for name in NAMES)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_small(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("way", ["flag", "variable", "file"])
def test_an_empty_directory_gets_the_small_model_where_it_is_asked_for(
    hub: Hub,
    tmp_path: Path,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    flags = {"flag": ["--small"], "file": ["--config", str(tmp_path / "settings.toml")]}
    (tmp_path / "settings.toml").write_text("small = true\n")
    if way == "variable":
        monkeypatch.setenv("OMNISPEECH_SMALL", "yes")
    models = tmp_path / "models"
    command = start(models, *flags.get(way, []))
    assert holds_small(models) and not hub.requests
    assert "--small" not in command[2:]
    assert f"putting the small model into {models}: OpenS2S, glm-4-voice-decoder" in caplog.messages
    assert caplog.messages[-1] == READY
    assert {"flow.safetensors", "hift.safetensors"} <= found(models / NAMES[1]).keys()
    Manifest(models).check(NAMES[0], deep=True)


def test_a_later_start_without_the_flag_takes_the_small_model_and_tells_the_way_to_the_other(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path, "--small")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    caplog.set_level(logging.INFO)
    for flags in ([], ["--small"]):
        caplog.clear()
        start(tmp_path, *flags)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        assert f"{tmp_path} holds the small model" in caplog.text
        assert f"22 GB: omnispeech fetch --update --models {tmp_path}\n" in caplog.text
        assert "--small changes" not in caplog.text and "this version" not in caplog.text
    assert not hub.requests
    assert cli.main(["fetch", "--update", "--models", str(tmp_path)]) == 0
    caplog.clear()
    start(tmp_path)
    assert "small" not in caplog.text and (tmp_path / "OpenS2S" / SHARD).exists()


def test_another_model_that_is_there_is_used_and_the_log_says_so(
    hub: Hub, models: Path, by_hand: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    start(by_hand, "--small")
    assert f"--small changes nothing: {by_hand} holds another model" in caplog.messages
    shutil.rmtree(models / NAMES[1])
    start(models, "--small")  # what the other model lacks is its own
    assert hub.sent.keys() == {"config.yaml", "flow.pt", "hift.pt"} and not holds_small(models)


def test_the_decoder_of_another_model_alone_is_no_reason_for_a_download(
    hub: Hub, models: Path
) -> None:
    shutil.rmtree(models / "OpenS2S")
    with pytest.raises(OmniSpeechError, match="decoder is there already, and the small model"):
        start(models, "--small")
    assert not hub.requests and not (models / "OpenS2S").exists()


def test_two_starts_at_once_put_one_small_model_there(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(omnispeech.startup, "write_small", twice)
    start(tmp_path, "--small")
    assert holds_small(tmp_path)


def twice(models: Path) -> None:
    """As if another start had been quicker."""
    write_small(models)
    before = (models / "OpenS2S").stat().st_ino
    write_small(models)
    assert (models / "OpenS2S").stat().st_ino == before


def test_a_read_only_directory_with_the_small_model_is_used(
    hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(small)
    monkeypatch.setattr(Path, "open", refuse_to_write(Path.open))
    start(small, "--small")
    with pytest.raises(OmniSpeechError, match="nothing can be written to the models directory"):
        start(small.parent / "empty", "--small")


def refuse_to_write(opened: Callable[..., Any]) -> Callable[..., Any]:
    def open_(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if "w" in mode:
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, mode, *rest, **named)

    return open_


@pytest.mark.parametrize("gone", NAMES)
def test_half_of_the_small_model_is_never_made_whole_by_another(
    hub: Hub, small: Path, gone: str
) -> None:
    shutil.rmtree(small / gone)
    (kept,) = set(NAMES) - {gone}
    told = f"{small / kept} is of the small model and fits no other {gone} than its own, which is"
    command = f"omnispeech small {small}"
    with pytest.raises(OmniSpeechError, match=f"{told} missing; .*: {command}, for the published"):
        start(small)
    assert not hub.requests
    start(small, "--small")
    assert holds_small(small)
    shutil.rmtree(small / gone)
    assert cli.main(command.split()[1:]) == 0
    start(small)


def test_half_of_the_small_model_beside_another_is_refused(
    hub: Hub, small: Path, published: Path
) -> None:
    shutil.rmtree(small / NAMES[1])
    Manifest(small).forget(NAMES[1])
    shutil.copytree(published / NAMES[1], small / NAMES[1])
    told = "fits no other glm-4-voice-decoder than its own, which is not the one there"
    for flags in ([], ["--small"]):
        with pytest.raises(OmniSpeechError, match=told):
            start(small, *flags)
    assert not hub.requests


def test_the_small_model_of_another_version_stays_and_the_new_one_is_named(
    hub: Hub, small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (small / "OpenS2S/README.md").write_text("of another version")
    Manifest(small).enter("OpenS2S", {"by": "omnispeech small"})
    caplog.set_level(logging.INFO)
    start(small, "--small")
    old = f"{small / NAMES[0]} and {small / NAMES[1]}"
    words = f"move {old} away, then: omnispeech small {small}"
    assert f"this version brings another one: {words}" in caplog.messages
    shutil.rmtree(small / NAMES[1])
    told = f"is missing; .*: move {small / NAMES[0]} away, then: omnispeech small {small},"
    with pytest.raises(OmniSpeechError, match=told):
        start(small, "--small")  # the new half would not fit the old one
    assert not hub.requests


def test_a_damaged_small_model_is_mended_without_a_hub(
    hub: Hub, small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (small / "OpenS2S/tokenizer.json").write_text("{}")
    told = rf"\(to put the small model back: move .* away, then: omnispeech small {small}\)"
    with pytest.raises(OmniSpeechError, match=told):
        start(small)
    assert not hub.requests and "another one" not in caplog.text  # it is of this version


def test_a_stop_while_the_small_model_is_written_leaves_nothing_that_counts(
    hub: Hub, tmp_path: Path
) -> None:
    """Where the process is the first of a container, its number is the same the next time."""
    for name in NAMES:
        (tmp_path / f".{name}.{os.getpid()}.partial").mkdir()
    start(tmp_path, "--small")
    assert holds_small(tmp_path) and not list(tmp_path.glob(".*.partial"))


def program(models: Path, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "startup.py"), "--models", str(models), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )
    PROGRAMS.append(process)
    return process


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    yield
    while PROGRAMS:
        process = PROGRAMS.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_the_worker_is_the_same_process_and_gets_its_signals(hub: Hub, converted: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    process = program(converted, "--port", port)
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), 120)
    arguments = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
    assert str(ROOT / "model_worker.py").encode() in arguments
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert READY in shown and "💡 No AWQ-quantized LLM found" in shown


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_while_fetching_ends_at_once_and_keeps_what_came(
    hub: Hub, tmp_path: Path, number: int
) -> None:
    befall(hub, SHARD, pause_s=0.3)
    process = program(tmp_path, "--port", "0")
    wait_until(lambda: hub.sent[SHARD] > 100_000, 120)
    began = time.monotonic()
    process.send_signal(number)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number and time.monotonic() - began < 5
    assert "stopped; the next start goes on from here" in shown and "Traceback" not in shown
    hub.mishaps.clear()
    start(tmp_path)
    assert [where for path, where in hub.requests if SHARD in path][-1].startswith("bytes=")


@pytest.mark.parametrize("proxy", ["", "http://127.0.0.1:9"])
def test_once_answers_the_shipped_question_and_ends(
    hub: Hub, converted: Path, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)  # for what is not on this machine
    process = program(converted, "--once", "--max-new-tokens", "12")
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    for part in (READY, "ready after ", "first audio after ", "real-time factor "):
        assert part in shown
    assert re.search(r"^  load [a-z ]+: \d+\.\d s", shown, re.MULTILINE)


def test_once_ends_with_its_worker_on_a_stop_signal(hub: Hub, converted: Path) -> None:
    process = program(converted, "--once")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: children.read_text() != "", 120)
    (child,) = map(int, children.read_text().split())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert not Path(f"/proc/{child}").exists()


def test_once_with_a_worker_that_fails_ends_with_its_reason(hub: Hub, converted: Path) -> None:
    process = program(converted, "--once", "--llm", "gptq")
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"{converted / 'OpenS2S-llm-gptq'} is missing; make it with: " in shown
    assert "startup.py: the worker ended with status 1 before it was ready" in shown


def test_verify_names_the_command_that_mends_what_was_fetched(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / "OpenS2S" / SHARD).unlink()
    assert cli.main(["verify", "--models", str(models), "OpenS2S"]) == 1
    command = f"omnispeech fetch OpenS2S --models {models}"
    assert f"(to mend it: {command})" in capsys.readouterr().out
