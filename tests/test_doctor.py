"""`omnispeech doctor`: what it says about a start, against what a start does."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import quantize_opens2s
from settled_models import AWQ, state, write_settled

from omnispeech.assembly import load_models
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import choose_sources
from omnispeech.cli import main
from omnispeech.config_reader import CONFIGS
from omnispeech.deployment import doctor, machine
from omnispeech.deployment.findings import Finding, as_text
from omnispeech.errors import CheckpointError
from omnispeech.small.directory import write_small
from omnispeech.tiny.decoder import write_decoder
from omnispeech.tiny.directory import write_tiny
from omnispeech.tiny.shape import TinyShape

DECODER = "glm-4-voice-decoder"

pytestmark = pytest.mark.usefixtures("no_settings")


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_settled(tmp_path_factory.mktemp("doctor") / "models")


@pytest.fixture
def models(settled: Path, tmp_path: Path) -> Path:
    """To be damaged; times are kept, as in a snapshot."""
    return Path(shutil.copytree(settled, tmp_path / "models"))


def ask(models: Path, *flags: str) -> int:
    return main(["doctor", "--models", str(models), "--device", "cpu", "--port", "0", *flags])


def found(
    models: Path, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, list[dict[str, Any]]]:
    status = ask(models, *flags, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["good"] == (status == 0)
    return status, told["findings"]


def words(findings: list[dict[str, Any]], topic: str, level: str | None = None) -> str:
    chosen = [f for f in findings if f["topic"] == topic and level in (None, f["level"])]
    return "\n".join(f["words"] for f in chosen)


def test_what_would_start_has_status_0(settled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(settled) == 0
    shown = capsys.readouterr().out
    assert "WRONG" not in shown
    assert f"takes        {settled / AWQ}\n" in shown
    assert "needs about" in shown and "(estimated)" in shown


def test_nothing_is_written(settled: Path) -> None:
    before = state(settled)
    ask(settled)
    assert state(settled) == before


@pytest.mark.parametrize("llm", ["auto", "bf16", "awq"])
def test_it_takes_what_a_start_takes_with_the_words_of_its_log(
    settled: Path,
    llm: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        sources = choose_sources(settled, llm)
    logged = [record.getMessage() for record in caplog.records]
    _, findings = found(settled, capsys, "--llm", llm)
    assert words(findings, "models").splitlines() == logged
    taken = [sources.base, *filter(None, [sources.llm]), sources.decoder]
    assert words(findings, "takes").splitlines() == [str(path) for path in taken]


def test_logs_are_as_before_afterwards(settled: Path, caplog: pytest.LogCaptureFixture) -> None:
    ask(settled, "--llm", "bf16")
    assert not caplog.records
    with caplog.at_level("INFO"):
        choose_sources(settled, "bf16")
    assert "Using original model" in caplog.text


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    def of(free: int) -> None:
        usage = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)

    return of


@pytest.mark.parametrize("name", ["models", "models/inner"])
def test_a_models_directory_that_can_be_none_is_wrong(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").touch()
    status, findings = found(tmp_path / name, capsys)
    assert status == 1
    assert "models is no directory; name a models" in words(findings, "models", "wrong")


@pytest.mark.parametrize("names", [[], ["OpenS2S", DECODER]], ids=["missing", "empty"])
def test_what_a_start_would_fetch_is_not_wrong(
    tmp_path: Path, names: list[str], room: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        (tmp_path / "models" / name).mkdir(parents=True)
    room(24 * 10**9)
    status, findings = found(tmp_path / "models", capsys)
    assert status == 0
    assert words(findings, "download", "note").count("startup.py fetches it") == 2


def test_the_small_model_needs_no_hub_and_little_room(
    tmp_path: Path,
    room: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    room(20 * 10**6)
    for flags, setting in ((["--small"], ""), ([], "true")):
        monkeypatch.setenv("OMNISPEECH_SMALL", setting)
        status, findings = found(tmp_path, capsys, *flags)
        assert status == 0 and not words(findings, "download")
        told = f"startup.py puts the small model there: OpenS2S, {DECODER}"
        assert told in words(findings, "models", "note")
        assert not list(tmp_path.iterdir())
    room(10**6)
    assert words(found(tmp_path, capsys)[1], "disk", "wrong").startswith("1.0 MB are free")
    status, findings = found(tmp_path, capsys, "--no-small")
    assert status == 1 and words(findings, "download", "wrong")


def test_half_of_the_small_model_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_small(tmp_path)
    assert ask(tmp_path) == 0
    shutil.rmtree(tmp_path / DECODER)
    assert ask(tmp_path, "--small") == 0
    capsys.readouterr()
    status, findings = found(tmp_path, capsys)
    assert status == 1 and "is of the small model and fits" in words(findings, "models", "wrong")


def test_what_a_start_would_miss_after_its_fetch_is_wrong(
    tmp_path: Path, room: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    room(10**12)
    status, findings = found(tmp_path, capsys, "--llm", "gptq")
    assert status == 1 and "llm-gptq is missing; make it" in words(findings, "models", "wrong")
    status, findings = found(tmp_path, capsys, "--audio-encoder", "wavlm")
    assert status == 1 and "omnispeech train-bridge" in words(findings, "models", "wrong")
    assert "wavlm-base-plus is not there" in words(findings, "download", "note")


def test_offline_what_has_to_be_fetched_is_wrong(
    tmp_path: Path, room: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    room(10**12)
    status, findings = found(tmp_path, capsys)
    assert status == 1
    assert "OpenS2S has to be fetched, and HF_HUB_OFFLINE" in words(findings, "download", "wrong")


def test_room_is_asked_for_what_is_not_here_and_for_what_should_stay_free(
    tmp_path: Path, room: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    room(23_000_000_000)  # 22.63 GB, and 1.07 more
    assert found(tmp_path, capsys)[0] == 1
    begun = tmp_path / "OpenS2S.partial/incomplete/shard"
    begun.parent.mkdir(parents=True)
    with begun.open("wb") as file:
        file.truncate(20_000_000_000)  # takes no room
    room(4_000_000_000)
    status, findings = found(tmp_path, capsys)
    assert status == 0
    assert "of which 20.00 GB are here" in words(findings, "download")


def test_a_mere_copy_is_not_wrong(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / "OpenS2S/config.json").touch()
    status, findings = found(models, capsys)
    assert status == 0
    assert "config.json is not as it was entered" in words(findings, "manifest", "note")


@pytest.mark.parametrize(("name", "size"), [("OpenS2S", "22"), (DECODER, "0.53")])
def test_what_is_missing_is_named_with_its_size_and_the_command(
    models: Path, name: str, size: str, room: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(models / name)
    room(24 * 10**9)
    status, findings = found(models, capsys)
    assert status == 0
    download = words(findings, "download")
    assert f"omnispeech fetch {name} --models {models}" in download
    assert size in download and "GB of" in download
    assert download.count("\n") == 0  # the other one is there


def test_a_damaged_quantized_model_is_named(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = models / AWQ / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    status, findings = found(models, capsys)
    assert status == 1
    assert f"{path} is not as it was entered" in words(findings, "models", "wrong")
    assert "quantize_llm_awq.py" in words(findings, "models", "wrong")


def test_a_damaged_shard_of_the_original_is_named(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sorted((models / "OpenS2S").glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-8])
    status, findings = found(models, capsys)
    wrong = [f for f in findings if f["level"] == "wrong"]
    assert status == 1
    assert any(str(path) in f["words"] for f in wrong)
    assert any(f"omnispeech fetch OpenS2S --models {models}" in f["words"] for f in wrong)


def test_headers_are_compared_where_there_is_no_record(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / "omnispeech-manifest.json").unlink()
    path = sorted((models / "OpenS2S").glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-8])
    status, findings = found(models, capsys, "--llm", "bf16")
    assert status == 1
    assert f"{path} is damaged" in words(findings, "weights", "wrong")


@pytest.mark.parametrize("name", ["flow", "hift"])
def test_half_a_decoder_is_wrong(
    models: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Manifest(models)  # says so, too, for a file that was entered
    for path in (models / DECODER).glob(f"{name}.*"):
        path.unlink()
    status, findings = found(models, capsys)
    assert status == 1
    assert f"{name}.pt is missing" in words(findings, "conversion", "wrong")


@pytest.mark.parametrize("base", ["OpenS2S", "OpenS2S-8bit"])
@pytest.mark.parametrize(("units", "known"), [(512, 1024), (1024, 512)])
def test_a_decoder_of_other_units_is_wrong_in_the_words_of_the_start(
    tmp_path: Path, base: str, units: int, known: int, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    write_tiny(models, shape=TinyShape(units=units))
    if base == "OpenS2S-8bit":
        quantize_opens2s(models / "OpenS2S", models / base)
        Manifest(models).enter(base, {"by": "the tests"})
        shutil.rmtree(models / "OpenS2S")
        Manifest(models).forget("OpenS2S")
    status, findings = found(models, capsys)
    assert status == 0 and words(findings, "decoder", "ok") == f"knows the {units} units of {base}"
    shutil.rmtree(models / DECODER)
    (models / DECODER).mkdir()
    write_decoder(models / DECODER, 0, TinyShape().decoder, known)
    Manifest(models).enter(DECODER, {"by": "the tests"})
    status, findings = found(models, capsys)
    with pytest.raises(CheckpointError, match="do not belong together") as refused:
        load_models(models, torch.device("cpu"), torch.float32)
    assert status == 1 and words(findings, "decoder", "wrong") == str(refused.value)


def test_a_decoder_that_cannot_be_read_is_wrong(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / DECODER / "config.yaml").unlink()
    status, findings = found(models, capsys)
    assert status == 1 and "config.yaml does not exist" in words(findings, "decoder", "wrong")


def test_a_conversion_to_come_is_told(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / DECODER / "hift.safetensors").unlink()
    _, findings = found(models, capsys)
    assert "hift.pt (" in words(findings, "conversion", "note")


def test_a_port_in_use_is_wrong(settled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        status, findings = found(settled, capsys, "--port", str(door.getsockname()[1]))
    assert status == 1
    assert "choose another --port" in words(findings, "port", "wrong")


def test_it_tells_who_may_come_in_and_shows_no_key(
    settled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMNISPEECH_API_KEY", raising=False)
    _, findings = found(settled, capsys)
    assert "only this machine reaches it" in words(findings, "door", "ok")
    _, findings = found(settled, capsys, "--host", "0.0.0.0")
    assert "whoever reaches it may use the server" in words(findings, "door", "note")
    monkeypatch.setenv("OMNISPEECH_API_KEY", "0123456789-abcdef")
    _, findings = found(settled, capsys, "--host", "0.0.0.0")
    assert words(findings, "door", "ok") == "0.0.0.0 asks for an API key"
    assert "OMNISPEECH_API_KEY=(not shown)" in words(findings, "environment")
    assert "0123456789-abcdef" not in str(findings)


def test_keys_and_certificates_that_no_start_would_take_are_wrong(
    settled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, findings = found(settled, capsys, "--api-keys", "none.toml")
    assert status == 1 and "none.toml does not exist" in words(findings, "door", "wrong")
    files = ("--tls-certificate", "none.pem", "--tls-key", "none.key")
    status, findings = found(settled, capsys, *files)
    assert status == 1 and "'none.pem' cannot be read" in words(findings, "door", "wrong")


def test_a_device_that_is_not_there_is_wrong(
    settled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, findings = found(settled, capsys, "--device", "cuda:7")
    assert status == 1
    assert "this machine has 0 CUDA devices" in words(findings, "device", "wrong")
    assert words(findings, "takes")  # all else is told nevertheless


def test_a_setting_that_is_wrong_is_refused_as_by_a_start(
    settled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(settled, "--kv-tokens", "10") == 1
    assert "kv_tokens=10" in capsys.readouterr().err


def test_too_little_memory_is_wrong_and_says_what_to_do(
    settled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "free_memory", lambda _: 10**6)
    status, findings = found(settled, capsys)
    assert status == 1
    assert "1.0 MB are free; take a quantized LLM" in words(findings, "memory", "wrong")


def test_settings_of_the_engine_change_what_it_needs(
    settled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, findings = found(settled, capsys, "--kv-tokens", "16384", "--dtype", "bf16")
    # 2 layers, keys and values of 2 heads of 32 numbers, 2 bytes each
    assert "KV cache of the LLM: 8.4 MB" in words(findings, "memory")


def test_too_little_disk_is_wrong(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(models / "OpenS2S")
    usage = shutil.disk_usage(models)._replace(free=10**9)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    _, findings = found(models, capsys)
    assert "1.00 GB are free" in words(findings, "disk", "wrong")


def test_a_copy_to_be_made_is_told_and_needs_room(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(models)._replace(free=400_000)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    status, findings = found(models, capsys)
    assert status == 0
    assert ".prepared-" in words(findings, "repacking", "ok")
    for path in models.glob(f"{AWQ}.prepared-*"):
        shutil.rmtree(path)
    status, findings = found(models, capsys)
    assert status == 1
    assert f"{AWQ} will be repacked" in words(findings, "repacking", "note")
    assert "400.0 kB are free" in words(findings, "disk", "wrong")
    status, findings = found(models, capsys, "--no-prepare")
    assert status == 0
    assert "repacked at every start" in words(findings, "repacking", "ok")


def test_the_environment_is_told_and_misspelt_names_are_noted(
    settled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMNISPEECH_KV_TOKENS", "8192")
    monkeypatch.setenv("OMNISPEECH_KV_TOKEN", "8192")
    _, findings = found(settled, capsys)
    assert "OMNISPEECH_KV_TOKENS=8192" in words(findings, "environment", "ok")
    assert "OMNISPEECH_KV_TOKEN is no setting" in words(findings, "environment", "note")


def test_what_is_wrong_comes_first() -> None:
    findings = [
        Finding("ok", "a", "fine"),
        Finding("wrong", "long topic", "broken"),
        Finding("note", "b", "by the way"),
    ]
    assert as_text(findings).splitlines() == [
        "WRONG  long topic  broken",
        "ok     a           fine",
        "note   b           by the way",
    ]


def test_every_flag_of_a_start_can_be_asked_about(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["doctor"], ["snapshot", "check"]):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        shown = capsys.readouterr().out
        for config in CONFIGS:
            for name in config.__dataclass_fields__:
                assert f"--{name.replace('_', '-')}" in shown
