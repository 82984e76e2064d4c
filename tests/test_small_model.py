"""The small model: its files are a part of the package, and what writes them into a directory."""

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest
from download_models import found
from hub_server import Hub, serving

from omnispeech import cli
from omnispeech.checkpoint.complete import check_complete
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.whole_file import size_text
from omnispeech.config import HubConfig
from omnispeech.download.lock import locked
from omnispeech.errors import CheckpointError
from omnispeech.small import directory
from omnispeech.small.directory import (
    CARD,
    NAMES,
    PLACE,
    is_small,
    lacking,
    shipped,
    shipped_size,
    write_small,
)
from omnispeech.tiny.directory import write_tiny

ROOT = Path(__file__).parent.parent
OPENS2S, DECODER = NAMES
KINDS = {".json", ".txt", ".safetensors", ".yaml", ".pt"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("small") / "models"
    write_small(place)
    return place


@pytest.fixture
def models(written: Path, tmp_path: Path) -> Path:
    place = tmp_path / "models"
    shutil.copytree(written, place)  # with the times of the manifest
    return place


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Holds two models of random weights."""
    write_tiny(tmp_path / "published")
    repositories = ("CASIA-LM/OpenS2S", "THUDM/glm-4-voice-decoder")
    files = {repo: found(tmp_path / "published" / repo.partition("/")[2]) for repo in repositories}
    with serving(Hub(files)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


# ---- the files


def in_package() -> set[str]:
    """All but Python's."""
    paths = (p.relative_to(PLACE) for p in PLACE.rglob("*") if p.is_file())
    return {p.as_posix() for p in paths if p.suffix not in (".py", ".pyc")}


def test_it_takes_fifteen_megabytes_at_most() -> None:
    assert 1e6 < shipped_size() <= 15e6


def test_its_card_names_its_size() -> None:
    named = re.search(r"and a glm-4-voice-decoder, ([\d.]+ MB) together", CARD.read_text("utf-8"))
    assert named and named[1] == size_text(shipped_size())


def test_nothing_else_lies_beside_it() -> None:
    """Such as what a server writes that was pointed there."""
    names = {f"{name}/{file}" for name in NAMES for file in shipped(name)} - {"OpenS2S/README.md"}
    assert in_package() == names | {CARD.name}
    assert {Path(name).suffix for name in names} == KINDS
    assert not [name for name in names if name.startswith(f"{DECODER}/") and "safetensors" in name]


def test_every_file_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["omnispeech.small"]
    taken = {p for pattern in patterns for p in glob(pattern, root_dir=PLACE, recursive=True)}
    assert {p for p in taken if (PLACE / p).is_file()} == in_package()


def test_git_ignores_none_of_it() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git, and a clone")
    paths = [str(PLACE / name) for name in in_package()]
    ran = subprocess.run(["git", "check-ignore", "--no-index", *paths], cwd=ROOT)
    assert ran.returncode == 1


# ---- the command


def test_it_is_whole_entered_and_says_what_made_it(models: Path) -> None:
    for name in NAMES:
        Manifest(models).check(name, deep=True)
        assert Manifest(models).entry(name).made == {"by": "omnispeech small"}
        assert is_small(models / name)
        contents = {file: path.read_bytes() for file, path in shipped(name).items()}
        assert found(models / name) == contents
    assert (models / OPENS2S / "README.md").read_bytes() == CARD.read_bytes()
    for name in NAMES:
        check_complete(models / name)


def test_the_command_says_what_it_wrote_and_verify_finds_it_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["small", str(tmp_path / "a/b")]) == 0
    told = f"wrote OpenS2S and glm-4-voice-decoder under {tmp_path / 'a/b'}\n"
    assert capsys.readouterr().out == told
    assert cli.main(["verify", "--models", str(tmp_path / "a/b"), "--deep"]) == 0


def test_it_needs_no_torch() -> None:
    code = "import sys, omnispeech.small.directory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_whole_small_model_is_left_alone(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = found(models)
    assert cli.main(["small", str(models)]) == 0
    assert capsys.readouterr().out == f"the small model is there already: {models}\n"
    assert found(models) == before


def test_of_a_copy_that_came_by_hand_it_is_entered_what_it_is(models: Path) -> None:
    Manifest(models).path.unlink()
    assert write_small(models) == []
    assert [Manifest(models).entry(name).made["by"] for name in NAMES] == ["omnispeech small"] * 2


@pytest.mark.parametrize("target", ["empty", "nowhere"])
def test_a_link_in_place_of_a_directory_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / OPENS2S).symlink_to(tmp_path / target)
    with pytest.raises(CheckpointError, match="OpenS2S is there already; name another directory"):
        write_small(tmp_path)


def test_beside_another_model_no_half_of_it_is_written(tmp_path: Path) -> None:
    (tmp_path / DECODER).mkdir()
    (tmp_path / DECODER / "flow.pt").touch()
    with pytest.raises(CheckpointError, match=f"{DECODER} is there already"):
        write_small(tmp_path)
    assert not (tmp_path / OPENS2S).exists() and Manifest(tmp_path).names() == []


def refused(capsys: pytest.CaptureFixture[str], given: str) -> str:
    """What the command says of a directory that it does not take."""
    assert cli.main(["small", given]) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["file", "file/below", "file/below/that"])
def test_a_file_in_place_of_the_directory_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    told = f"{tmp_path / 'file'} is no directory; name a models directory: omnispeech small DIR\n"
    assert refused(capsys, str(tmp_path / name)).endswith(f": {told}")


def test_where_nothing_can_be_written_the_command_names_no_flag_that_it_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    told = refused(capsys, str(tmp_path / "models"))
    assert "Read-only file system" in told
    assert told.endswith("or name another: omnispeech small DIR\n")


@pytest.mark.parametrize("name", [*NAMES, "OpenS2S-8bit"])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "by its name"])
def test_into_a_model_nothing_is_written(
    tmp_path: Path,
    name: str,
    inside: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").touch()
    monkeypatch.chdir(tmp_path / name if inside else tmp_path)
    told = f"{tmp_path / name} is one level too deep; use omnispeech small {tmp_path}\n"
    assert refused(capsys, "." if inside else name).endswith(f": {told}")
    assert [path.name for path in (tmp_path / name).iterdir()] == ["config.json"]


def test_the_working_directory_is_taken_by_its_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "'' names no directory; for the one you are in: omnispeech small ." in refused(
        capsys, ""
    )
    assert not list(tmp_path.iterdir())
    assert cli.main(["small", "."]) == 0
    assert is_small(tmp_path / OPENS2S)


def test_what_is_written_is_like_any_new_file_whatever_the_package_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "package"
    shutil.copytree(PLACE, place)
    for path in place.rglob("*"):
        path.chmod(0o500 if path.is_dir() else 0o400)
    monkeypatch.setattr(directory, "PLACE", place)
    monkeypatch.setattr(directory, "CARD", place / CARD.name)
    before = os.umask(0o022)
    try:
        write_small(tmp_path / "models")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "models").rglob("*/**/*")}
    assert modes == {0o644, 0o755}
    assert {stat.S_IMODE((tmp_path / "models" / name).stat().st_mode) for name in NAMES} == {0o755}


def test_a_full_disk_leaves_nothing_and_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:10])
        if target.name == "hift.pt":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match=r"disk of .* is full .*takes 1\d\.\d MB: make room"):
        write_small(tmp_path)
    assert [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_disk_too_full_for_the_manifest_tells_the_same(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a copy that came by hand is to be entered."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.copytree(written, tmp_path / "models")
    Manifest(tmp_path / "models").path.unlink()
    monkeypatch.setattr(Manifest, "enter", full)
    with pytest.raises(CheckpointError, match=r"is full .*takes 1\d\.\d MB: make room"):
        write_small(tmp_path / "models")


KILLED = """
import os, signal, sys
from pathlib import Path
from omnispeech.small import directory
event, count = sys.argv[2], int(sys.argv[3])
def watch(name, *_):
    global count
    if name == event:
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
directory.write_small(Path(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("event", "count"),
    [
        pytest.param("shutil.copyfile", 1, id="early"),
        pytest.param("shutil.copyfile", 15, id="late"),
        pytest.param("os.rename", 0, id="without a name"),
        pytest.param("os.rename", 1, id="named and not entered"),
        pytest.param("os.rename", 2, id="one of two"),
    ],
)
def test_what_a_kill_has_left_is_completed_by_the_same_command(
    tmp_path: Path, event: str, count: int
) -> None:
    command = [sys.executable, "-B", "-c", KILLED, str(tmp_path), event, str(count)]
    assert subprocess.run(command, cwd=ROOT).returncode == -9
    named = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert set(named) <= {OPENS2S, "omnispeech-manifest.json"}
    assert lacking(tmp_path, HubConfig(), wanted=True) == [
        name for name in NAMES if name not in named
    ]
    assert write_small(tmp_path) == [name for name in NAMES if name not in named]
    for name in NAMES:
        Manifest(tmp_path).check(name, deep=True)
        assert Manifest(tmp_path).entry(name).made == {"by": "omnispeech small"}
    assert not list(tmp_path.glob(".*.partial"))


def test_two_that_write_at_once_do_not_meet(tmp_path: Path) -> None:
    code = "import sys; from omnispeech.cli import main; sys.exit(main())"
    with locked(tmp_path):
        command = [sys.executable, "-c", code, "small", str(tmp_path)]
        processes = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert sorted(process.wait(60) for process in processes) == [0, 0]
    for name in NAMES:
        Manifest(tmp_path).check(name, deep=True)


# ---- the hub


def test_fetch_does_not_take_it_for_the_published_one(
    models: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fetch", "--models", str(models)]) == 1
    command = f"omnispeech fetch --update --models {models}"
    said = capsys.readouterr().err
    assert f"{models / OPENS2S} is of the small model that comes with omnispeech" in said
    assert said.endswith(f"for the published one in its place: {command}\n")
    assert not hub.requests
    assert cli.main(command.split()[1:]) == 0
    for name in NAMES:
        assert not is_small(models / name)
        assert Manifest(models).entry(name).made["by"] == "omnispeech fetch"
        assert found(models / name).items() >= found(models.parent / "published" / name).items()
    check_complete(models / OPENS2S)
    check_complete(models / DECODER)


def test_a_damaged_one_is_put_back_from_the_package(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / DECODER / "flow.pt").write_bytes(b"no")
    assert cli.main(["verify", "--models", str(models)]) == 1
    told = capsys.readouterr().out
    words = f"move {models / OPENS2S} and {models / DECODER} away, then: omnispeech small {models}"
    assert f"(to put the small model back: {words})" in told
    for name in NAMES:
        (models / name).rename(models / f"{name}.old")
    assert cli.main(["small", str(models)]) == 0
    assert cli.main(["verify", "--models", str(models)]) == 0
