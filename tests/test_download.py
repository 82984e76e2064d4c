"""Fetching with the real huggingface_hub, from a small hub of our own on loopback."""

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from download_models import (
    DECODER,
    OPENS2S,
    QUICK,
    SHARD,
    befall,
    beside,
    bring,
    content,
    decoder_files,
    found,
    opens2s_files,
    published,
    repositories,
    settings,
)
from hub_server import Hub, serving, sibling, wait_until

from omnispeech.checkpoint.manifest import FileRecord, Manifest
from omnispeech.download.directory import fetch, fetch_all
from omnispeech.download.hub import HubFile
from omnispeech.download.models import MODELS
from omnispeech.download.partial import Partial
from omnispeech.download.retries import Patience
from omnispeech.download.transfer import Content
from omnispeech.errors import CheckpointError, ConfigError, Unavailable

TOKEN = "hf_of_a_reader"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with serving(Hub(repositories())) as server:
        yield server


def test_a_model_arrives_as_it_is_on_the_hub_and_is_entered(hub: Hub, tmp_path: Path) -> None:
    models = tmp_path / "models"  # it is made
    assert fetch("OpenS2S", models, settings(hub)) == models / "OpenS2S"
    assert found(models / "OpenS2S") == published(hub.repositories[OPENS2S])
    assert beside(models) == {"OpenS2S", "omnispeech-manifest.json"}
    entry = Manifest(models).entry("OpenS2S")
    assert entry.files.keys() == published(hub.repositories[OPENS2S]).keys()
    assert {"by": "omnispeech fetch", "repo": OPENS2S, "revision": "main"}.items() <= (
        entry.made.items()
    )
    assert len(entry.made["commit"]) == 40
    Manifest(models).check("OpenS2S", deep=True)


def test_of_the_decoder_only_what_a_start_needs_is_fetched(hub: Hub, tmp_path: Path) -> None:
    bring(hub, tmp_path, "glm-4-voice-decoder")
    assert found(tmp_path / "glm-4-voice-decoder").keys() == decoder_files().keys() - {"speech.wav"}


def test_nothing_is_hashed_again_to_enter_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashed(path: Path) -> FileRecord:
        pytest.fail(f"{path} was hashed a second time")

    for module in ("checkpoint.manifest", "download.directory", "download.present"):
        monkeypatch.setattr(f"omnispeech.{module}.record_file", hashed)
    bring(hub, tmp_path)
    Manifest(tmp_path).check("OpenS2S")


def test_all_is_pinned_to_the_commit_that_was_listed(hub: Hub, tmp_path: Path) -> None:
    bring(hub, tmp_path)
    commit = Manifest(tmp_path).entry("OpenS2S").made["commit"]
    files = [path for path, _ in hub.requests if "/resolve/" in path]
    assert len(files) == 7 and all(f"/resolve/{commit}/" in path for path in files)


@pytest.mark.parametrize("cut", [0, 1, 70_001, 199_999])
def test_a_connection_that_is_cut_is_taken_up_where_it_ended(
    hub: Hub, tmp_path: Path, cut: int
) -> None:
    befall(hub, SHARD, cut_after=cut, times=2)
    bring(hub, tmp_path)
    assert found(tmp_path / "OpenS2S") == published(hub.repositories[OPENS2S])
    asked = [where for path, where in hub.requests if path.endswith(SHARD)]
    assert (
        asked
        == ["", f"bytes={cut}-" if cut else "", f"bytes={2 * cut}-" if cut else ""][: len(asked)]
    )
    assert hub.sent[SHARD] == 200_000  # no byte was sent twice


def test_a_hub_that_does_not_continue_is_read_from_the_beginning(hub: Hub, tmp_path: Path) -> None:
    befall(hub, SHARD, cut_after=70_000, times=1)
    befall(hub, SHARD, ignore_range=True)
    bring(hub, tmp_path)
    assert found(tmp_path / "OpenS2S") == published(hub.repositories[OPENS2S])


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("part", ["/revision/", SHARD])
def test_what_may_pass_is_tried_again(hub: Hub, tmp_path: Path, status: int, part: str) -> None:
    befall(hub, part, status=status, times=3)
    bring(hub, tmp_path)
    assert found(tmp_path / "OpenS2S") == published(hub.repositories[OPENS2S])


def test_a_hub_that_gives_nothing_more_ends_the_fetch_and_what_came_is_kept(
    hub: Hub, tmp_path: Path
) -> None:
    befall(hub, SHARD, cut_after=70_000, times=1)
    befall(hub, SHARD, status=503, times=4)
    with pytest.raises(Unavailable, match=r"status 503; 4 attempts in a row.*is kept: start again"):
        bring(hub, tmp_path)
    assert not (tmp_path / "OpenS2S").exists()
    bring(hub, tmp_path)
    assert [where for path, where in hub.requests if SHARD in path][-1] == "bytes=70000-"
    assert hub.sent["tokenizer.json"] == 2  # and what was whole is not fetched again


def test_a_hub_that_sends_the_same_beginning_again_and_again_is_given_up(
    hub: Hub, tmp_path: Path
) -> None:
    befall(hub, SHARD, cut_after=70_000, ignore_range=True, times=30)
    with pytest.raises(Unavailable, match="4 attempts in a row"):
        bring(hub, tmp_path)
    assert hub.sent[SHARD] == 4 * 70_000


def test_retry_after_is_waited_for(hub: Hub, tmp_path: Path) -> None:
    befall(hub, "/revision/", status=429, headers={"Retry-After": "1"}, times=1)
    began = time.monotonic()
    bring(hub, tmp_path)
    assert time.monotonic() - began > 1


def test_a_hub_that_asks_for_too_long_a_pause_is_not_waited_for(hub: Hub, tmp_path: Path) -> None:
    befall(hub, "/revision/", status=429, headers={"Retry-After": "86400"})
    with pytest.raises(Unavailable, match="asks to wait 86400 s"):
        bring(hub, tmp_path)


def test_a_wish_that_is_no_sensible_number_is_told_as_one(hub: Hub, tmp_path: Path) -> None:
    befall(hub, "/revision/", status=429, headers={"Retry-After": "9" * 400})
    with pytest.raises(Unavailable, match="asks to wait 9{9} s"):
        bring(hub, tmp_path)


def test_pauses_grow_up_to_a_limit() -> None:
    patience = Patience()
    pauses = [patience.pause_s(failures) for failures in range(1, patience.failures)]
    assert pauses[:4] == [1, 2, 4, 8] and pauses[-1] == 60
    assert 180 < sum(pauses) < 600


@pytest.mark.parametrize(
    ("status", "word"),
    [(401, "HF_TOKEN to a token that is valid"), (403, "accept the terms"), (404, "opens2s-repo")],
)
@pytest.mark.parametrize("part", ["/revision/", SHARD])
def test_what_does_not_pass_is_told_at_once_with_what_to_do(
    hub: Hub, tmp_path: Path, status: int, word: str, part: str
) -> None:
    befall(hub, part, status=status)
    with pytest.raises(ConfigError, match=rf"CASIA-LM/OpenS2S.*\({status}\).*{word}"):
        bring(hub, tmp_path)
    assert sum(part in path for path, _ in hub.requests) == 1
    assert not (tmp_path / "OpenS2S").exists()


def test_names_and_revisions_are_settings(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["me/Mine"] = {**opens2s_files(), "mine.txt": b"mine"}
    fetch("OpenS2S", tmp_path, settings(hub, opens2s_repo="me/Mine"))
    assert (tmp_path / "OpenS2S/mine.txt").read_bytes() == b"mine"
    with pytest.raises(ConfigError, match="its revision 'v2'"):
        fetch("glm-4-voice-decoder", tmp_path, settings(hub, decoder_revision="v2"))
    with pytest.raises(ConfigError, match="'a/b/c' is no name of a repository"):
        fetch("glm-4-voice-decoder", tmp_path, settings(hub, decoder_repo="a/b/c"))
    with pytest.raises(ConfigError, match="'Other' is not fetched from a hub; known: OpenS2S, glm"):
        fetch("Other", tmp_path, settings(hub))


def test_a_repository_of_another_model_is_refused_before_a_byte_of_it(
    hub: Hub, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.yaml: it is no glm-4-voice-decoder"):
        fetch("glm-4-voice-decoder", tmp_path, settings(hub, decoder_repo=OPENS2S))
    assert not hub.sent


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//x", "..\\x", "a\0x", "a\nx"])
def test_a_file_name_that_leaves_the_directory_is_refused(
    hub: Hub, tmp_path: Path, name: str
) -> None:
    hub.repositories[OPENS2S][name] = b"x"
    with pytest.raises(ConfigError, match="file name"):
        bring(hub, tmp_path / "models")
    assert not (tmp_path / "x").exists()


def test_a_hash_that_leaves_the_directory_is_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lying(path: str, content: bytes) -> dict[str, Any]:
        item = sibling(path, content)
        return item | (
            {"lfs": item["lfs"] | {"sha256": "/../../../victim"}} if "lfs" in item else {}
        )

    (tmp_path / "victim").write_text("of another program")
    monkeypatch.setattr("hub_server.sibling", lying)
    with pytest.raises(ConfigError, match=r"hash '/../../../victim' of 'model-00001"):
        bring(hub, tmp_path)
    assert (tmp_path / "victim").read_text() == "of another program"


@pytest.mark.parametrize("token", ["“hf_secret”", "hf_\x01secret"])
def test_a_token_that_cannot_be_sent_is_told_and_not_shown(
    hub: Hub, tmp_path: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=r"HF_TOKEN.*holds a sign that no token has") as told:
        bring(hub, tmp_path)
    assert "secret" not in str(told.value) and not hub.requests


def test_a_token_goes_to_the_hub_and_into_no_message(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.token = TOKEN
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        bring(hub, tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    befall(hub, SHARD, cut_after=70_000, times=1)
    befall(hub, SHARD, status=503, times=2)
    bring(hub, tmp_path)
    assert f"Bearer {TOKEN}" in hub.tokens
    assert (
        TOKEN not in caplog.text and TOKEN not in (tmp_path / Manifest(tmp_path).path).read_text()
    )


def test_files_may_lie_elsewhere_and_the_token_does_not_go_there(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving(Hub(repositories())) as elsewhere:
        hub.elsewhere = elsewhere.url.replace("127.0.0.1", "localhost")
        befall(elsewhere, SHARD, cut_after=70_000, times=1)
        bring(hub, tmp_path)
    assert found(tmp_path / "OpenS2S") == published(hub.repositories[OPENS2S])
    assert elsewhere.tokens == {None} and not hub.sent
    assert [where for path, where in elsewhere.requests if SHARD in path] == ["", "bytes=70000-"]


def test_the_endpoint_of_the_environment_is_respected(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    fetch("OpenS2S", tmp_path, settings(hub, hub_endpoint=""))
    assert hub.requests


def test_what_is_no_hub_is_told(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["a/b"] = opens2s_files()
    befall(hub, "/revision/", status=200)
    with pytest.raises(ConfigError, match="does not answer as a hub"):
        fetch("OpenS2S", tmp_path, settings(hub, opens2s_repo="a/b"))


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path, hub: Hub) -> None:
    nowhere = settings(hub, hub_endpoint="http://127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"http://127.0.0.1:9 cannot be fetched"):
        fetch_all(["OpenS2S"], tmp_path, nowhere, patience=Patience(failures=2, first_s=0.001))


def test_a_damaged_file_is_fetched_again(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    befall(hub, SHARD, damage=True, times=1)
    befall(hub, "/tokenizer.json", damage=True, times=1)  # no large file: git's hash
    bring(hub, tmp_path)
    assert found(tmp_path / "OpenS2S") == published(hub.repositories[OPENS2S])
    assert f"{SHARD} arrived damaged; fetching it again" in caplog.text
    assert "tokenizer.json arrived damaged" in caplog.text


def test_a_file_that_stays_damaged_is_named_with_both_hashes_and_not_kept(
    hub: Hub, tmp_path: Path
) -> None:
    befall(hub, SHARD, damage=True)
    hashes = "its hash should be [0-9a-f]{64}, it is [0-9a-f]{64}"
    with pytest.raises(CheckpointError, match=rf"{SHARD} of .* damaged 3 times: {hashes}"):
        bring(hub, tmp_path)
    assert not list((tmp_path / "OpenS2S.partial").rglob(f"{SHARD}*"))
    assert not (tmp_path / "OpenS2S").exists()


def test_bytes_that_were_damaged_on_the_disk_are_found(hub: Hub, tmp_path: Path) -> None:
    befall(hub, SHARD, cut_after=70_000, times=1)
    befall(hub, SHARD, status=404, times=1)
    with pytest.raises(ConfigError):
        bring(hub, tmp_path)
    (grown,) = tmp_path.rglob(f"{SHARD}.*")
    grown.write_bytes(bytes(70_000))
    bring(hub, tmp_path)
    assert found(tmp_path / "OpenS2S") == published(hub.repositories[OPENS2S])


def test_a_slow_hub_is_waited_for_and_one_that_stalls_is_asked_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.4)
    befall(hub, SHARD, pause_s=0.05, times=1)  # slower than the timeout in all
    befall(hub, "model-00002", pause_s=2.0, times=1)
    bring(hub, tmp_path)
    assert found(tmp_path / "OpenS2S") == published(hub.repositories[OPENS2S])
    count = {part: sum(part in path for path, _ in hub.requests) for part in (SHARD, "model-00002")}
    assert count == {SHARD: 1, "model-00002": 2}


class Usage(NamedTuple):
    free: int


def test_room_is_asked_for_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 657_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free))
    with pytest.raises(
        CheckpointError, match=r"657\.0 kB free; 329\.0 kB are still to be .* 329\.0 kB should"
    ):
        bring(hub, tmp_path, "OpenS2S", "glm-4-voice-decoder")  # of both together
    assert not hub.sent
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free + 1_100))
    bring(hub, tmp_path, "OpenS2S", "glm-4-voice-decoder")


def test_room_for_what_is_here_already_is_not_asked_for(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    befall(hub, SHARD, cut_after=150_000, times=1)
    befall(hub, SHARD, status=404, times=1)
    with pytest.raises(ConfigError):
        fetch_all(["OpenS2S"], tmp_path, settings(hub, connections=1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(301_000))
    bring(hub, tmp_path)  # 50 kB of one shard, and the other


def test_a_disk_that_is_full_in_the_middle_loses_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Content.add

    def until_full(self: Content, piece: bytes) -> None:
        if self.size >= 70_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, piece[: 70_000 - self.size])

    befall(hub, SHARD, pause_s=0.02)
    with monkeypatch.context() as full:
        full.setattr(Content, "add", until_full)
        with pytest.raises(CheckpointError, match=rf"disk of {tmp_path} is full \(No space left"):
            bring(hub, tmp_path)
    assert not (tmp_path / "OpenS2S").exists()
    hub.requests.clear()
    bring(hub, tmp_path)
    assert found(tmp_path / "OpenS2S") == published(hub.repositories[OPENS2S])
    grown = {path.rpartition("/")[2]: where for path, where in hub.requests if "/resolve/" in path}
    assert "bytes=70000-" in grown.values()


def test_files_that_changed_on_the_hub_meanwhile_are_the_only_ones_fetched_anew(
    hub: Hub, tmp_path: Path
) -> None:
    befall(hub, SHARD, cut_after=70_000, times=1)
    befall(hub, SHARD, status=404, times=1)
    with pytest.raises(ConfigError):
        fetch_all(["OpenS2S"], tmp_path, settings(hub, connections=1))
    hub.repositories[OPENS2S] = {
        **hub.repositories[OPENS2S],
        SHARD: content(200_000, 9),
        "config.json": b'{"new": 1}',
    }
    del hub.repositories[OPENS2S]["empty.txt"]
    hub.requests.clear()
    bring(hub, tmp_path)
    assert found(tmp_path / "OpenS2S") == published(hub.repositories[OPENS2S])
    assert [where for path, where in hub.requests if SHARD in path] == [""]  # no old half of it


def test_two_at_once_fetch_every_byte_once_and_the_second_says_that_it_waits(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    hub.gate.clear()
    arguments = {"deep": False, "patience": QUICK}
    threads = [
        threading.Thread(
            target=fetch_all, args=(["OpenS2S"], tmp_path, settings(hub)), kwargs=arguments
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: "another process is fetching" in caplog.text)
    hub.gate.set()
    for thread in threads:
        thread.join()
    assert found(tmp_path / "OpenS2S") == published(hub.repositories[OPENS2S])
    assert hub.sent[SHARD] == 200_000
    assert "comparing" not in caplog.text  # and the second reads none of them


def test_an_error_of_one_file_stops_the_others(hub: Hub, tmp_path: Path) -> None:
    befall(hub, SHARD, pause_s=0.2)  # 13 pieces: 2.6 s
    befall(hub, "tokenizer.json", status=404)
    began = time.monotonic()
    with pytest.raises(ConfigError):
        bring(hub, tmp_path)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("offline", ["1", "ON", "true"])
def test_offline_without_the_files_is_a_clear_error(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, offline: str
) -> None:
    monkeypatch.setenv(name, offline)
    with pytest.raises(Unavailable, match=rf"OpenS2S has to be fetched, and {name} is set"):
        bring(hub, tmp_path)
    assert not hub.requests


def test_offline_with_the_files_nothing_is_asked(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(hub, tmp_path)
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    bring(hub, tmp_path)
    assert not hub.requests


def changed(path: Path) -> Any:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_fetched_model_is_mended_file_by_file(hub: Hub, tmp_path: Path) -> None:
    bring(hub, tmp_path)
    changed(tmp_path / "OpenS2S" / SHARD)
    (tmp_path / "OpenS2S/tts/tokenizer.json").unlink()
    before = Manifest(tmp_path).entry("OpenS2S")
    hub.requests.clear()
    bring(hub, tmp_path)
    assert found(tmp_path / "OpenS2S") == published(opens2s_files())
    asked = {path.rpartition("/")[2] for path, _ in hub.requests if "/resolve/" in path}
    assert asked == {SHARD, "tokenizer.json"}
    after = Manifest(tmp_path).entry("OpenS2S")
    assert after.made == before.made  # the same commit
    Manifest(tmp_path).check("OpenS2S")
    assert beside(tmp_path) == {"OpenS2S", "omnispeech-manifest.json"}


def test_the_old_file_stays_until_the_new_one_is_verified(hub: Hub, tmp_path: Path) -> None:
    bring(hub, tmp_path)
    changed(tmp_path / "OpenS2S" / SHARD)
    bad = (tmp_path / "OpenS2S" / SHARD).read_bytes()
    befall(hub, SHARD, damage=True)
    with pytest.raises(CheckpointError):
        bring(hub, tmp_path)
    assert (tmp_path / "OpenS2S" / SHARD).read_bytes() == bad


def test_mending_stays_at_its_commit_and_update_goes_on(hub: Hub, tmp_path: Path) -> None:
    bring(hub, tmp_path)
    first = Manifest(tmp_path).entry("OpenS2S").made
    hub.repositories[OPENS2S]["config.json"] = b'{"later": 1}'
    bring(hub, tmp_path)
    assert Manifest(tmp_path).entry("OpenS2S").made == first
    hub.requests.clear()
    bring(hub, tmp_path, update=True)
    assert (tmp_path / "OpenS2S/config.json").read_bytes() == b'{"later": 1}'
    assert sum("/resolve/" in path for path, _ in hub.requests) == 1
    assert Manifest(tmp_path).entry("OpenS2S").made["commit"] != first["commit"]


def test_mending_goes_where_the_files_came_from_whatever_is_set_now(
    hub: Hub, tmp_path: Path
) -> None:
    bring(hub, tmp_path)
    changed(tmp_path / "OpenS2S/config.json")
    hub.repositories["me/Mine"] = {**opens2s_files(), "config.json": b'{"mine": 1}'}
    other = settings(hub, opens2s_repo="me/Mine")
    fetch("OpenS2S", tmp_path, other)
    assert found(tmp_path / "OpenS2S") == published(opens2s_files())
    fetch("OpenS2S", tmp_path, other, update=True)
    assert (tmp_path / "OpenS2S/config.json").read_bytes() == b'{"mine": 1}'
    assert Manifest(tmp_path).entry("OpenS2S").made["repo"] == "me/Mine"


def test_what_came_by_hand_is_compared_and_only_what_differs_is_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    for path, data in published(opens2s_files()).items():
        (tmp_path / "OpenS2S" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "OpenS2S" / path).write_bytes(data)
    changed(tmp_path / "OpenS2S" / SHARD)
    (tmp_path / "OpenS2S/notes.txt").write_text("mine")
    bring(hub, tmp_path)
    assert set(hub.sent) == {SHARD}
    assert found(tmp_path / "OpenS2S") == published(opens2s_files()) | {"notes.txt": b"mine"}
    assert "notes.txt" not in Manifest(tmp_path).entry("OpenS2S").files


def test_a_copy_at_another_time_is_entered_anew_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    bring(hub, tmp_path)
    os.utime(tmp_path / "OpenS2S" / SHARD, (1, 1))
    hub.requests.clear()
    bring(hub, tmp_path)
    Manifest(tmp_path).check("OpenS2S")
    assert not hub.requests


def test_what_no_hub_made_is_never_replaced(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "OpenS2S").mkdir()
    (tmp_path / "OpenS2S/config.json").write_text("{}")
    Manifest(tmp_path).enter("OpenS2S", {"by": "omnispeech tiny"})
    changed(tmp_path / "OpenS2S/config.json")
    with pytest.raises(CheckpointError, match="made by 'omnispeech tiny' and comes from no hub"):
        bring(hub, tmp_path)
    assert not hub.requests


def test_a_commit_that_the_hub_has_no_more_is_told_with_the_way_out(
    hub: Hub, tmp_path: Path
) -> None:
    bring(hub, tmp_path)
    changed(tmp_path / "OpenS2S/config.json")
    hub.repositories[OPENS2S]["config.json"] = b'{"new": 1}'
    with pytest.raises(ConfigError, match="no more, from which OpenS2S came.*--update goes to"):
        bring(hub, tmp_path)
    bring(hub, tmp_path, update=True)
    assert found(tmp_path / "OpenS2S") == published(hub.repositories[OPENS2S])


def test_a_directory_may_be_a_link(hub: Hub, tmp_path: Path) -> None:
    elsewhere, models = tmp_path / "elsewhere", tmp_path / "models"
    elsewhere.mkdir()
    models.mkdir()
    (models / "OpenS2S").symlink_to(elsewhere)
    bring(hub, models)
    assert found(elsewhere) == published(hub.repositories[OPENS2S])
    assert beside(models) == {"OpenS2S", "omnispeech-manifest.json"}
    Manifest(models).check("OpenS2S")


def test_a_file_on_another_disk_is_mended(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def within_a_disk(source: Path, target: Path) -> None:
        if source.parent != target.parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target)

    bring(hub, tmp_path)
    changed(tmp_path / "OpenS2S" / SHARD)
    rename = os.rename
    keep = Partial.keep

    def kept(self: Partial, file: HubFile, sha256: str) -> None:
        keep(self, file, sha256)
        monkeypatch.setattr(os, "replace", within_a_disk)

    monkeypatch.setattr(Partial, "keep", kept)
    bring(hub, tmp_path)
    assert found(tmp_path / "OpenS2S") == published(hub.repositories[OPENS2S])
    assert beside(tmp_path) == {"OpenS2S", "omnispeech-manifest.json"}
    Manifest(tmp_path).check("OpenS2S")


def test_a_place_that_cannot_be_written_is_told_before_the_hub_is_asked(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="nothing can be written to the models directory"):
        bring(hub, Path("/proc/models"))
    assert not hub.requests


def test_a_record_that_cannot_be_read_costs_a_second_fetch_and_no_error(
    hub: Hub, tmp_path: Path
) -> None:
    befall(hub, SHARD, status=404, times=1)
    with pytest.raises(ConfigError):
        bring(hub, tmp_path)
    (tmp_path / "OpenS2S.partial/record.json").write_text("{")
    bring(hub, tmp_path)
    assert found(tmp_path / "OpenS2S") == published(hub.repositories[OPENS2S])


def in_place_of_the_partial(models: Path) -> str:
    (models / "OpenS2S.partial").touch()
    return "OpenS2S.partial is no directory"


def in_place_of_a_file(models: Path) -> str:
    (models / "OpenS2S/config.json").mkdir(parents=True)
    return "OpenS2S/config.json is in the way"


def in_place_of_a_folder(models: Path) -> str:
    (models / "OpenS2S").mkdir()
    (models / "OpenS2S/tts").touch()
    return "OpenS2S/tts is in the way"


@pytest.mark.parametrize("put", [in_place_of_the_partial, in_place_of_a_file, in_place_of_a_folder])
def test_what_is_in_the_way_is_named(hub: Hub, tmp_path: Path, put: Callable[[Path], str]) -> None:
    told = put(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/{told}.*move it away"):
        bring(hub, tmp_path)


def test_a_disk_that_is_full_at_the_end_is_told_and_nothing_fetched_twice(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "finish", lambda self: self.path.exists() and full())
        with pytest.raises(CheckpointError, match=rf"disk of {tmp_path} is full \(No space left"):
            bring(hub, tmp_path)
    hub.sent.clear()
    bring(hub, tmp_path)
    assert not hub.sent


def test_a_file_and_a_folder_of_one_name_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[OPENS2S]["tts"] = b"a file"
    with pytest.raises(CheckpointError, match=r"has 'tts/tokenizer.json' and a file 'tts': no"):
        bring(hub, tmp_path)
    assert not hub.sent


def test_a_name_that_no_disk_takes_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[OPENS2S]["é" * 120] = b"240 bytes"
    with pytest.raises(ConfigError, match="a file name of more than 238 bytes: 'éééé"):
        bring(hub, tmp_path)
    assert not hub.sent


@pytest.mark.parametrize("link", [False, True])
def test_a_models_directory_that_is_none_is_told(hub: Hub, tmp_path: Path, link: bool) -> None:
    models = tmp_path / "models"
    models.symlink_to("nowhere") if link else models.touch()
    words = "a link to nowhere, and " if link else ""
    for place in (models, models / "inner"):
        with pytest.raises(ConfigError, match=f"{models} is {words}no directory; name a"):
            bring(hub, place)


def test_the_table_names_the_published_repositories() -> None:
    assert {name: model.repo for name, model in MODELS.items()} == {
        "OpenS2S": OPENS2S,
        "glm-4-voice-decoder": DECODER,
        "wavlm-base-plus": "microsoft/wavlm-base-plus",
    }
