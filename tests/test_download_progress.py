"""What a fetch tells while it runs."""

import io
import logging
import sys
from pathlib import Path

import pytest
from download_models import SHARD, befall, bring, repositories
from hub_server import Hub, serving

from omnispeech.download import progress
from omnispeech.download.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_with_bytes_rate_and_time_left_every_few_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = Progress("OpenS2S", 22_000_000_000, 2_000_000_000, every_s=5.0)
    shown.add(1_000_000_000)
    shown.show()
    assert not caplog.messages  # not yet
    now = 105.0
    shown.show()
    shown.show()
    assert caplog.messages == ["OpenS2S: 3.00 GB of 22.00 GB (14 %), 0.20 GB/s, 95 s left"]


def test_before_the_first_byte_no_time_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing came yet" in Progress("OpenS2S", 1000).line()


def test_a_terminal_gets_one_bar_of_all_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = Progress("OpenS2S", 1_000_000, 250_000)
    shown.add(750_000)
    shown.close()
    last = terminal.getvalue().rpartition("\r")[2]
    assert "OpenS2S: 100%" in last and "1.00M/1.00M" in last


def test_a_fetch_tells_its_beginning_its_progress_and_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Progress.__init__, "__kwdefaults__", {"every_s": 0.1})
    with serving(Hub(repositories())) as hub:
        befall(hub, SHARD, pause_s=0.05)
        bring(hub, tmp_path)
    ours = [record.message for record in caplog.records if record.name.startswith("omnispeech")]
    begun, *lines, end = ours
    assert begun.startswith("fetching OpenS2S: 8 of 8 files, 300.0 kB, from CASIA-LM/OpenS2S at ")
    assert lines and all(line.startswith("OpenS2S: ") and " kB/s, " in line for line in lines)
    assert end == f"{tmp_path / 'OpenS2S'} is whole: every file has the hash that the hub names"
