"""Runs that were stopped and go on, and outputs that are there already."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from language_model_files import METHOD, calibration, language_model
from quantization_runs import (
    LOG,
    Rounding,
    Spy,
    contents,
    crashing,
    device,
    flip_last_byte,
    full_disk,
    quantize,
)

from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.quantization import layer_loop, state
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.pipeline import run
from omnispeech.quantization.progress import Progress
from omnispeech.quantization.run_settings import RunSettings
from omnispeech.quantization.state import WorkDirectory, partial_path

HERE = Path(__file__).parent


@pytest.fixture
def source(tmp_path: Path) -> LanguageFiles:
    return language_model(tmp_path / "model")


@pytest.fixture
def expected(source: LanguageFiles, tmp_path: Path) -> dict[str, Any]:
    quantize(source, tmp_path / "undisturbed")
    return contents(tmp_path / "undisturbed")


STEPS = [(name, i) for name in ("save_layer", "save_streams") for i in range(4)]
STEPS = [step for step in STEPS if step != ("save_layer", 3)]  # three layers, four states


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("step", "count"), STEPS)
def test_a_run_that_crashed_anywhere_goes_on_to_the_same_bytes(
    step: str,
    count: int,
    before: bool,
    source: LanguageFiles,
    expected: dict[str, Any],
    tmp_path: Path,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkDirectory, step, crashing(getattr(WorkDirectory, step), count, before))
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantize(source, tmp_path / "out")
    assert contents(tmp_path / "out") == expected
    assert not partial_path(tmp_path / "out").exists()


def test_finished_layers_are_not_made_again(source: LanguageFiles, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkDirectory, "save_layer", crashing(WorkDirectory.save_layer, 2, True))
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out")
    spy = type("OneSpy", (Spy,), {"seen": []})
    quantize(source, tmp_path / "out", build=spy)
    assert len(spy.seen) == 1


def test_killed_at_random_points_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, HERE / "kill_and_resume.py", tmp_path, "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("3 of 3 the same")


@pytest.mark.parametrize("module", ["state", "output"])
@pytest.mark.parametrize("count", [0, 3])
def test_a_full_disk_is_said_and_the_run_goes_on_later(
    module: str, count: int, source: LanguageFiles, expected: dict[str, Any], tmp_path: Path
) -> None:
    place = f"omnispeech.quantization.{module}.write_tensor_file"
    settings = {"shard_size": 20_000} if module == "output" else {}
    quantize(source, tmp_path / "again", **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, full_disk(state.write_tensor_file, count))
        with pytest.raises(CheckpointError, match=r"no room is left .* start the same command"):
            quantize(source, tmp_path / "out", **settings)
    assert not list(partial_path(tmp_path / "out").rglob(".*.partial"))
    quantize(source, tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


@pytest.fixture
def interrupted(source: LanguageFiles, tmp_path: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkDirectory, "save_layer", crashing(WorkDirectory.save_layer, 2, True))
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out")
    yield tmp_path / "out"


def test_a_partial_of_other_settings_is_not_continued(
    source: LanguageFiles, interrupted: Path
) -> None:
    method = MethodSettings(method="rtn", group_size=64)
    with pytest.raises(ConfigError, match=r"method\.group_size was 32 and is 64.*--restart"):
        quantize(source, interrupted, method=method)
    with pytest.raises(ConfigError, match=r"the calibration data differ \(--calib, --seq_len"):
        quantize(source, interrupted, given=calibration(source, seed=2))
    with pytest.raises(
        ConfigError, match="kept in float16 was no linear of a layer and is layer 0;"
    ):
        quantize(source, interrupted, keep_fp_layers=(0,))


def test_an_interrupted_run_leaves_a_log_of_its_layers_and_memory(interrupted: Path) -> None:
    log = (partial_path(interrupted) / LOG).read_text()
    assert log.startswith("not finished: 2 of 3 layers; KeyboardInterrupt\n")
    assert re.search(r"layer 1: \d+\.\d s, peak memory \d", log) and "layer 2: " not in log
    assert "micro-batch 2048 tokens" in log


def test_a_run_killed_in_its_first_layer_has_left_a_log(
    source: LanguageFiles, tmp_path: Path
) -> None:
    logs = []

    class Killed(Rounding):
        def quantize(self, *_: Any, **__: Any) -> Any:
            logs.append((partial_path(tmp_path / "out") / LOG).read_text())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", build=Killed)
    assert "not finished: 0 of 3 layers\n" in logs[0] and "peak memory" in logs[0]


def test_a_log_that_cannot_be_written_does_not_hide_the_error(
    source: LanguageFiles, tmp_path: Path
) -> None:
    def full(path: Path, text: str) -> None:
        if "out of memory" in text:
            raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_loop, "write_text", full)
        with pytest.raises(ConfigError, match="out of memory at layer 0"):
            quantize(source, tmp_path / "out", build=device(0))


def test_a_default_that_is_asked_for_is_no_other_run(
    source: LanguageFiles, interrupted: Path
) -> None:
    asked = MethodSettings(
        method="rtn", group_size=32, zero_point=True, rounding="rtn", dump_salient=True
    )
    quantize(source, interrupted, method=asked)
    assert quantize(source, interrupted).found
    other = MethodSettings(method="rtn", group_size=32, zero_point=False)
    with pytest.raises(ConfigError, match=r"method\.zero_point was True and is False"):
        quantize(source, interrupted, method=other)


def test_restart_throws_away_what_cannot_be_read(source: LanguageFiles, interrupted: Path) -> None:
    (partial_path(interrupted) / "signature.json").write_text("{garbled")
    with pytest.raises(CheckpointError, match=r"signature\.json"):
        quantize(source, interrupted)
    quantize(source, interrupted, restart=True)


def test_a_partial_without_a_layer_is_in_no_way(source: LanguageFiles, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkDirectory, "save_streams", crashing(lambda *_: None, 0, True))
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out")
    quantize(source, tmp_path / "out", method=MethodSettings(method="rtn", group_size=64))


def test_a_manifest_that_cannot_be_read_is_told_before_the_work(
    source: LanguageFiles, tmp_path: Path
) -> None:
    (tmp_path / "omnispeech-manifest.json").write_text("{garbled")
    spy = type("OneSpy", (Spy,), {"seen": []})
    with pytest.raises(CheckpointError, match=r"omnispeech-manifest\.json.*omnispeech verify"):
        quantize(source, tmp_path / "out", build=spy)
    assert not spy.seen and not partial_path(tmp_path / "out").exists()


def test_restart_throws_the_partial_away(source: LanguageFiles, interrupted: Path) -> None:
    spy = type("OneSpy", (Spy,), {"seen": []})
    method = MethodSettings(method="rtn", group_size=64)
    quantize(source, interrupted, method=method, restart=True, build=spy)
    assert len(spy.seen) == 3
    assert not partial_path(interrupted).exists()


def test_leftovers_of_a_killed_write_are_removed(
    source: LanguageFiles, interrupted: Path, expected: dict[str, Any]
) -> None:
    left = partial_path(interrupted) / ".layer-00002.safetensors.123.partial"
    left.write_bytes(b"half")
    (partial_path(interrupted) / "result").mkdir()
    (partial_path(interrupted) / "result/model.safetensors").write_bytes(b"half")
    signature = json.loads((partial_path(interrupted) / "signature.json").read_text())
    del signature["format"]
    with WorkDirectory.open(interrupted, signature) as work:
        assert not left.exists() and not work.result.exists()
    quantize(source, interrupted)
    assert contents(interrupted) == expected


def test_two_runs_on_one_output_are_refused(source: LanguageFiles, interrupted: Path) -> None:
    signature = json.loads((partial_path(interrupted) / "signature.json").read_text())
    del signature["format"]
    refused = pytest.raises(ConfigError, match="another run is working in .*out.partial")
    with WorkDirectory.open(interrupted, signature), refused:
        quantize(source, interrupted)
    quantize(source, interrupted)


def test_a_layer_damaged_on_disk_is_not_passed_on(source: LanguageFiles, interrupted: Path) -> None:
    flip_last_byte(partial_path(interrupted) / "layer-00001.safetensors")
    with pytest.raises(CheckpointError, match="not what was quantized"):
        quantize(source, interrupted)
    assert not interrupted.exists()


def test_an_existing_result_is_checked_and_reported_as_found(
    source: LanguageFiles, tmp_path: Path
) -> None:
    first = quantize(source, tmp_path / "out")
    again = quantize(source, tmp_path / "out", build=device(0))
    assert (first.found, again.found) == (False, True)
    assert again.data == json.loads((tmp_path / "out/quantization_report.json").read_text())


@pytest.mark.parametrize("entered", [True, False])
def test_an_existing_result_that_is_damaged_is_no_success(
    entered: bool, source: LanguageFiles, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "out")
    flip_last_byte(tmp_path / "out/model.safetensors")
    if not entered:
        (tmp_path / "omnispeech-manifest.json").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors|not what was quantized"):
        quantize(source, tmp_path / "out")


def test_an_existing_result_of_other_settings_is_no_success(
    source: LanguageFiles, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "out")
    method = MethodSettings(method="rtn", group_size=64)
    with pytest.raises(ConfigError, match=r"method\.group_size was 32 and is 64.*--overwrite"):
        quantize(source, tmp_path / "out", method=method)


def test_a_directory_of_something_else_is_never_overwritten(
    source: LanguageFiles, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="no finished result of this program.*--overwrite"):
        quantize(source, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"holds letter\.txt, .* remove the directory yourself"):
        quantize(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/letter.txt").read_text() == "dear"


def test_the_original_is_never_overwritten_and_an_empty_directory_is_in_no_way(
    source: LanguageFiles, tmp_path: Path
) -> None:
    weights = source.directory / "model.safetensors"
    before = weights.read_bytes()
    for place in (source.directory, tmp_path, tmp_path / "x/../model"):
        with pytest.raises(ConfigError, match="holds the original model"):
            quantize(source, place, overwrite=True)
    assert weights.read_bytes() == before
    (tmp_path / "out").mkdir()
    quantize(source, tmp_path / "out")
    assert (tmp_path / "out/config.json").is_file()


def test_overwrite_replaces_a_result_only_by_a_finished_one(
    source: LanguageFiles, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    method = MethodSettings(method="rtn", group_size=64)
    with pytest.raises(ConfigError, match="out of memory"):
        quantize(source, tmp_path / "out", method=method, overwrite=True, build=device(0))
    assert contents(tmp_path / "out") == before
    quantize(source, tmp_path / "out", method=method, overwrite=True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["group_size"] == 64
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"model", "out"}


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_older_result_is_never_lost_between_two_names(
    overwrite: bool, source: LanguageFiles, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    method = MethodSettings(method="rtn", group_size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", crashing(os.rename, 0, before=False))
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out", method=method, overwrite=True)
    assert not (tmp_path / "out").exists()
    if overwrite:
        quantize(source, tmp_path / "out", method=method, overwrite=True)
        assert quantize(source, tmp_path / "out", method=method).found
    else:
        assert quantize(source, tmp_path / "out").found
        assert contents(tmp_path / "out") == before
    assert not (tmp_path / ".out.replaced").exists()


def test_a_result_replaced_but_not_removed_goes_with_the_next_run(
    source: LanguageFiles, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / ".out.replaced")
    (tmp_path / ".out.replaced/config.json").write_text("old")
    assert quantize(source, tmp_path / "out").found
    assert contents(tmp_path / "out") == before and not (tmp_path / ".out.replaced").exists()


def test_an_output_that_is_a_link_stays_one(
    source: LanguageFiles, expected: dict[str, Any], tmp_path: Path
) -> None:
    place = tmp_path / "disk/place"
    place.mkdir(parents=True)
    (tmp_path / "out").symlink_to(place)
    quantize(source, tmp_path / "out")
    assert (tmp_path / "out").readlink() == place
    assert contents(place) == expected
    method = MethodSettings(method="rtn", group_size=64)
    quantize(source, tmp_path / "out", method=method, overwrite=True)
    Manifest(tmp_path).check("out", deep=True)
    assert [path.name for path in place.parent.iterdir()] == ["place"]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "disk",
        "model",
        "out",
        "undisturbed",
    }


def test_a_run_stopped_before_the_manifest_is_finished_by_the_next(
    source: LanguageFiles, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "enter", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out")
    assert quantize(source, tmp_path / "out").found
    Manifest(tmp_path).check("out", deep=True)
    assert not partial_path(tmp_path / "out").exists()


@pytest.mark.parametrize("count", range(10))
def test_a_run_stopped_while_it_cleans_up_is_finished_by_the_next(
    source: LanguageFiles, count: int, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        remove = WorkDirectory.remove

        def stopped(work: WorkDirectory) -> None:
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, crashing(getattr(os, name), count, before=False))
            remove(work)

        patch.setattr(WorkDirectory, "remove", stopped)
        with contextlib.suppress(KeyboardInterrupt):
            quantize(source, tmp_path / "out")
    assert quantize(source, tmp_path / "out").found
    assert not partial_path(tmp_path / "out").exists()


def test_the_manifest_knows_a_finished_result(source: LanguageFiles, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out")
    Manifest(tmp_path).check("out", deep=True)
    assert Manifest(tmp_path).entry("out").made["method"]["group_size"] == 32


def test_a_dry_run_leaves_nothing(source: LanguageFiles, tmp_path: Path) -> None:
    progress = io.StringIO()
    settings = RunSettings(dry_run=True)
    given = calibration(source)
    assert (
        run(source, given, METHOD, settings, tmp_path / "out", progress=Progress(progress)) is None
    )
    assert "layout gemm, 4 bits" in progress.getvalue()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def planned(source: LanguageFiles, output: Path, method: MethodSettings = METHOD) -> str:
    said = io.StringIO()
    settings = RunSettings(dry_run=True)
    run(source, calibration(source), method, settings, output, progress=Progress(said))
    return said.getvalue()


def test_a_dry_run_tells_what_is_there_already(
    source: LanguageFiles, interrupted: Path, tmp_path: Path
) -> None:
    other = MethodSettings(method="rtn", group_size=64)
    assert "out.partial is of an interrupted run, which goes on" in planned(source, interrupted)
    assert re.search(
        r"out\.partial .* not this one \(.*group_size was 32 and is 64\): --restart",
        planned(source, interrupted, other),
    )
    quantize(source, interrupted)
    assert "out is there already: what is asked for" in planned(source, interrupted)
    assert re.search(
        r"out is there already: not what is asked for \(.*group_size was 32 and is 64\); --overw",
        planned(source, interrupted, other),
    )
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/letter.txt").write_text("dear")
    assert "letters is there already: no finished result" in planned(source, tmp_path / "letters")
