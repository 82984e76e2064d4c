"""A fetch that is killed at any moment is taken up by the next start."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from download_models import (
    OPENS2S,
    QUICK,
    SHARD,
    befall,
    beside,
    bring,
    found,
    published,
    repositories,
    settings,
)
from hub_server import Hub, serving

from omnispeech.checkpoint.manifest import Manifest
from omnispeech.download.directory import fetch_all
from omnispeech.download.present import settle

HERE = Path(__file__).parent


def test_a_fetch_that_is_killed_anywhere_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """At twenty random moments; KILL_SEED in the environment chooses others."""
    seed = os.environ.get("KILL_SEED", "0")
    with serving(Hub(repositories())) as hub:
        befall(hub, SHARD, pause_s=0.01)
        command = [sys.executable, str(HERE / "kill_and_fetch.py"), hub.url, str(tmp_path)]
        ran = subprocess.run([*command, "20", seed], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "20 of 20 the same\n", ran.stdout + ran.stderr


class Killed(BaseException):
    pass


def dies_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """The process does nothing more from the `step`th change of names in the file system on."""
    count = 0

    def wrapped(change: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: Any, **options: Any) -> None:
            nonlocal count
            count += 1
            if count >= step:
                raise Killed
            change(*args, **options)

        return counted

    for name in ("replace", "unlink", "rmdir"):
        patch.setattr(os, name, wrapped(getattr(os, name)))


def start(hub: Hub, models: Path) -> None:
    if not settle(models / "OpenS2S", settings(hub)):
        fetch_all(["OpenS2S"], models, settings(hub, connections=1), patience=QUICK)


@pytest.mark.parametrize("mending", [False, True], ids=["new", "mended"])
def test_no_step_of_a_fetch_leaves_what_the_next_start_cannot_finish(
    tmp_path: Path, mending: bool
) -> None:
    with serving(Hub(repositories())) as hub:
        for step in range(1, 1000):
            models = tmp_path / str(step)
            if mending:
                bring(hub, models)
                (models / "OpenS2S/config.json").write_bytes(b"changed")
                (models / "OpenS2S" / SHARD).unlink()
            with pytest.MonkeyPatch.context() as patch:
                dies_at(step, patch)
                try:
                    bring(hub, models)
                    break
                except Killed:
                    pass
            if mending:
                bring(hub, models)
            start(hub, models)
            assert found(models / "OpenS2S") == published(hub.repositories[OPENS2S])
            assert beside(models) == {"OpenS2S", "omnispeech-manifest.json"}, step
            Manifest(models).check("OpenS2S")
    assert step > 10
