"""Which directories are whole: entered once, compared whenever they are used."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from omnispeech.checkpoint.manifest import FILE_NAME, FileRecord, Manifest, record_file
from omnispeech.errors import CheckpointError

VERIFY = "omnispeech verify --models"
MADE = {"command": "quantize_llm_awq.py", "bits": 4, "keep": [0, -1]}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    fill(tmp_path / "awq")
    return tmp_path


def fill(directory: Path) -> None:
    (directory / "inner").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "inner" / "weights").write_bytes(bytes(range(256)) * 100)


def entered(models: Path) -> Manifest:
    manifest = Manifest(models)
    manifest.enter("awq", MADE)
    return manifest


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000_000))


def test_what_was_entered_is_whole(models: Path) -> None:
    manifest = entered(models)
    manifest.check("awq")
    manifest.check("awq", deep=True)
    assert manifest.names() == ["awq"]


def test_an_entry_tells_files_and_how_and_when_it_was_made(models: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    entered(models)
    entry = Manifest(models).entry("awq")
    assert entry.made == MADE
    assert before <= datetime.fromisoformat(entry.entered) <= datetime.now(UTC)
    assert entry.files.keys() == {"config.json", "inner/weights"}
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of {}
    assert (entry.files["config.json"].sha256, entry.files["config.json"].size) == (digest, 2)


def test_nothing_is_entered_where_there_is_no_manifest(tmp_path: Path) -> None:
    assert Manifest(tmp_path).names() == []


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.unlink(), "it is missing"),
        (lambda path: path.write_bytes(b"short"), "it has 5 bytes instead of 25600"),
    ],
)
def test_a_file_that_changed_or_went_is_named(
    models: Path, change: Callable[[Path], object], reason: str, deep: bool
) -> None:
    manifest = entered(models)
    change(models / "awq/inner/weights")
    with pytest.raises(CheckpointError) as error:
        manifest.check("awq", deep=deep)
    assert str(error.value).startswith(f"{models / 'awq/inner/weights'} is not as it was entered")
    assert reason in str(error.value)


def test_equal_bytes_with_a_new_time_are_accepted_after_they_were_compared(models: Path) -> None:
    manifest = entered(models)
    made = manifest.entry("awq")
    touch(models / "awq/config.json")
    with pytest.raises(CheckpointError, match=r"config\.json .* it was written to, or copied"):
        manifest.check("awq")
    manifest.check("awq", deep=True)
    manifest.check("awq")
    assert (manifest.entry("awq").made, manifest.entry("awq").entered) == (MADE, made.entered)


def test_only_what_was_touched_is_hashed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = entered(models)
    touch(models / "awq/config.json")
    hashed = []

    def record(path: Path) -> FileRecord:
        hashed.append(path)
        return record_file(path)

    monkeypatch.setattr("omnispeech.checkpoint.manifest.record_file", record)
    manifest.check_touched("awq")
    assert hashed == [models / "awq/config.json"]
    manifest.check("awq")
    touch(models / "awq/inner/weights")
    data = (models / "awq/inner/weights").read_bytes()
    (models / "awq/inner/weights").write_bytes(bytes(len(data)))
    with pytest.raises(CheckpointError, match="weights is not as .*: its bytes have changed$"):
        manifest.check_touched("awq")


def test_one_changed_byte_is_found_by_the_deep_check_alone(models: Path) -> None:
    manifest = entered(models)
    path = models / "awq/inner/weights"
    time_before = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, time_before))
    manifest.check("awq")
    with pytest.raises(CheckpointError, match="its bytes have changed"):
        manifest.check("awq", deep=True)


def test_files_that_came_in_addition_do_no_harm(models: Path) -> None:
    manifest = entered(models)
    (models / "awq/notes.txt").write_text("mine")
    manifest.check("awq")
    manifest.check("awq", deep=True)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_text("shortened")])
def test_reports_for_people_may_change_or_go(
    models: Path, change: Callable[[Path], object], deep: bool
) -> None:
    reports = [models / "awq" / f"quantization_report.{kind}" for kind in ("json", "log")]
    for path in reports:
        path.write_text("the mean loss was small")
    manifest = entered(models)
    for path in reports:
        change(path)
    touch(models / "awq/config.json")
    manifest.check("awq", deep=True)
    manifest.check("awq", deep=deep)
    assert "quantization_report.json" in manifest.entry("awq").files


def test_what_is_gone_is_forgotten_and_nothing_else(models: Path) -> None:
    manifest = entered(models)
    fill(models / "gptq")
    manifest.enter("gptq", {})
    with pytest.raises(CheckpointError, match="awq is still there; delete it first"):
        manifest.forget("awq")
    shutil.rmtree(models / "awq")
    manifest.forget("awq")
    assert manifest.names() == ["gptq"]
    with pytest.raises(CheckpointError, match="awq is not in"):
        manifest.forget("awq")


def test_a_link_to_nowhere_is_not_forgotten(models: Path) -> None:
    manifest = entered(models)
    (models / "awq").rename(models / "elsewhere")
    (models / "awq").symlink_to(models / "unmounted")
    with pytest.raises(CheckpointError, match="awq is still there"):
        manifest.forget("awq")


def test_entering_again_replaces_the_entry(models: Path) -> None:
    manifest = entered(models)
    (models / "awq/config.json").unlink()
    manifest.enter("awq", {"bits": 8})
    manifest.check("awq")
    assert manifest.entry("awq").made == {"bits": 8}


def test_what_was_never_entered_is_refused(models: Path) -> None:
    with pytest.raises(CheckpointError, match="awq is not in .*it was not finished"):
        Manifest(models).check("awq")


@pytest.mark.parametrize("name", ["nowhere", "../awq", "awq/inner", "..", ".", ""])
def test_only_directories_of_the_models_directory_are_entered(models: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a directory in"):
        Manifest(models).enter(name, MADE)


def test_an_empty_directory_is_not_entered(models: Path) -> None:
    (models / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty holds no files"):
        Manifest(models).enter("empty", MADE)


# the file itself


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds list instead of an object"),
        ('{"format": 2, "entries": {}}', "has format 2; known: 1; .* or move the file away"),
        ('{"entries": {}}', "has format None; known: 1"),
        ('{"format": 1}', "is damaged"),
        (
            '{"format": 1, "entries": {"awq": {"made": null, "entered": "", "files": {}}}}',
            "damaged",
        ),
        ('{"format": 1, "entries": []}', "is damaged"),
        ('{"format": 1, "entries": {"awq": {}}}', "is damaged"),
        ('{"format": 1, "entries": {"awq": {"made": {}, "entered": "", "files": 3}}}', "damaged"),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_named_and_kept(
    models: Path, content: str, message: str
) -> None:
    path = models / FILE_NAME
    path.write_text(content)
    for use in (Manifest(models).names, lambda: Manifest(models).enter("awq", MADE)):
        with pytest.raises(CheckpointError, match=message) as error:
            use()
        assert str(path) in str(error.value)
        assert f"away, then enter what is whole anew with: {VERIFY} {models}" in str(error.value)
    assert path.read_text() == content


def test_a_manifest_that_cannot_be_read_is_named(models: Path) -> None:
    (models / FILE_NAME).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        Manifest(models).names()


def test_a_manifest_that_cannot_be_written_is_named(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omnispeech.checkpoint.manifest.replace_file", no_room)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        Manifest(models).enter("awq", MADE)


def test_nothing_is_forgotten_where_the_manifest_cannot_be_written(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = entered(models)
    (models / "awq").rename(models / "elsewhere")
    monkeypatch.setattr("omnispeech.checkpoint.manifest.replace_file", no_room)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        manifest.forget("awq")
    assert manifest.names() == ["awq"]


def test_a_deep_check_needs_no_place_to_write(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = entered(models)
    touch(models / "awq/config.json")
    monkeypatch.setattr("omnispeech.checkpoint.manifest.replace_file", no_room)
    manifest.check("awq", deep=True)
    assert "awq is whole" in caplog.text


def no_room(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def enter_many(models: Path, first: int) -> None:
    for number in range(first, first + 10):
        Manifest(models).enter(f"model{number}", {"number": number})


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_writers_in_several_processes_lose_nothing(tmp_path: Path) -> None:
    for number in range(30):
        fill(tmp_path / f"model{number}")
    start = multiprocessing.get_context("fork")
    writers = [start.Process(target=enter_many, args=(tmp_path, first)) for first in (0, 10, 20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    manifest = Manifest(tmp_path)
    assert set(manifest.names()) == {f"model{number}" for number in range(30)}
    assert all(manifest.entry(f"model{n}").made == {"number": n} for n in range(30))


def test_a_writer_that_is_killed_leaves_the_old_manifest_and_no_lock(models: Path) -> None:
    manifest = entered(models)
    before = (models / FILE_NAME).read_bytes()
    code = (
        "import sys, time; from pathlib import Path\n"
        "from omnispeech.checkpoint import manifest\n"
        "def half(path, text):\n"
        "    path.write_text(text[:20])\n"
        "    print('half', flush=True)\n"
        "    time.sleep(60)\n"
        "manifest._write = half\n"
        "manifest.Manifest(Path(sys.argv[1])).enter('awq', {'bits': 8})\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(models)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        writer.send_signal(signal.SIGKILL)
    assert (models / FILE_NAME).read_bytes() == before
    manifest.check("awq")
    started = time.monotonic()
    manifest.enter("awq", {"bits": 3})
    assert time.monotonic() - started < 10
    assert json.loads((models / FILE_NAME).read_text())["entries"]["awq"]["made"] == {"bits": 3}


def test_what_was_hashed_already_is_entered_as_it_is_and_nothing_else(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = {"inner/weights": record_file(models / "awq/inner/weights")}
    monkeypatch.setattr("omnispeech.checkpoint.manifest.record_file", lambda _: pytest.fail("read"))
    entry = Manifest(models).enter("awq", MADE, records)
    assert entry.files == records
    (models / "awq/config.json").write_text("of no model")
    Manifest(models).check("awq")
    with pytest.raises(CheckpointError, match="holds no files"):
        Manifest(models).enter("awq", MADE, {})


def test_what_a_killed_writer_left_goes_with_the_next_entry(models: Path) -> None:
    left = models / f".{FILE_NAME}.12345.partial"
    left.write_text("half of it")
    entered(models)
    assert not left.exists()
