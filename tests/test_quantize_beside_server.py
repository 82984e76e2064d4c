"""Quantizing on a GPU that a server holds: enough room, or a refusal that says how to get it."""

from pathlib import Path

import pytest
import torch
from command_models import quantize_llm

from omnispeech.errors import ConfigError
from omnispeech.quantization.memory import free_memory, freeing_advice
from omnispeech.quantize_cli import calibrate, runs
from omnispeech.quantize_cli.room import require_room

pytestmark = pytest.mark.usefixtures("no_settings_of_this_machine")

CUDA = torch.device("cuda")
GB = 10**9


def device(monkeypatch: pytest.MonkeyPatch, *, free: int, total: int, own: int = 0) -> None:
    """A GPU of which `own` bytes are taken by this process."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: own)
    monkeypatch.setattr(runs, "choose_device", lambda _: CUDA)


def test_a_gpu_that_a_server_fills_is_refused_with_what_frees_it(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device(monkeypatch, free=1_000_000, total=24 * GB)
    monkeypatch.setattr(calibrate, "speech_calibration", None)  # nothing is heard
    assert quantize_llm(models) == 2
    said = capsys.readouterr().err
    assert "device memory" in said and "of 1.0 MB free" in said
    assert "other processes hold 24.00 GB of its 24.00 GB" in said
    assert "./build_and_run.sh --quantize" in said and "--device cpu" in said
    assert not list(models.glob("OpenS2S-llm-awq*"))


def test_models_that_listen_have_the_same_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, free=GB, total=24 * GB)
    require_room("they", GB, CUDA)
    with pytest.raises(ConfigError, match=r"2\.00 GB of device memory.* hold 23\.00 GB"):
        require_room("they", 2 * GB, CUDA)


def test_what_this_process_holds_is_of_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, free=GB, total=24 * GB, own=22 * GB + GB // 2)
    assert freeing_advice(CUDA) == "use --device cpu"


def test_a_gpu_too_full_to_be_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    with pytest.raises(ConfigError, match=r"cuda cannot be used \(CUDA error: out of memory\); "):
        free_memory(CUDA)
