"""What a run says while it works and afterwards, and the memory it measures."""

import io
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from language_model_files import METHOD, Rounding, calibration, language_model
from quantization_runs import device, quantize
from safetensors.torch import load_file

from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.quantization import memory
from omnispeech.quantization.memory import MemoryMonitor, Peak, resident_memory
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.pipeline import run
from omnispeech.quantization.progress import Progress, duration
from omnispeech.quantization.report import Report
from omnispeech.quantization.run_settings import RunSettings


@pytest.fixture
def source(tmp_path: Path) -> LanguageFiles:
    return language_model(tmp_path / "model")


@pytest.fixture
def report(source: LanguageFiles) -> Report:
    return quantize(source, source.directory.parent / "out", keep_fp_layers=(1,))


# --- the report


def test_sizes_are_those_of_the_files(report: Report, source: LanguageFiles) -> None:
    original = load_file(source.directory / "model.safetensors")
    stored = load_file(report.output / "model.safetensors")
    assert report.sizes == (
        sum(t.nbytes for t in original.values()),
        sum(t.nbytes for t in stored.values()),
    )
    queries = [n for n in stored if "layers.0.self_attn.q_proj" in n]
    kept = stored["model.layers.1.self_attn.q_proj.weight"].nbytes
    expected = 2 * sum(stored[n].nbytes for n in queries) + kept
    assert report.data["sizes"]["self_attn.q_proj"]["stored"] == expected


def test_means_are_over_the_quantized_linears(report: Report) -> None:
    linears = [r for layer in report.data["layers"] for r in layer["linears"].values()]
    assert report.data["summary"]["linears"] == len(linears) == 14
    assert report.loss == pytest.approx(sum(r["loss"] for r in linears) / 14)
    assert report.data["summary"]["identity_share"] == 1


def test_a_kept_layer_has_no_loss(report: Report) -> None:
    assert [len(layer["linears"]) for layer in report.data["layers"]] == [7, 0, 7]


def test_tokens_settings_and_versions_are_in_it(report: Report) -> None:
    data = report.data
    assert data["calibration"]["tokens"] == {"text": 122}
    assert data["settings"]["method"]["group_size"] == 32
    assert data["versions"]["torch"] == torch.__version__
    assert (data["sequence_length"], data["batch_tokens"]) == (64, 2048)


def test_each_layer_has_its_time_and_peak(report: Report) -> None:
    measured = report.data["measured"]
    assert len(measured["layers"]) == 3
    assert measured["peak_ram"] >= max(layer["peak_ram"] for layer in measured["layers"]) > 10**8
    assert measured["peak_vram"] == 0


def test_both_reports_lie_in_the_directory_and_agree(report: Report) -> None:
    text = (report.output / "quantization_report.log").read_text()
    data = json.loads((report.output / "quantization_report.json").read_text())
    assert data == report.data
    assert f"mean loss {report.loss:.4g} over 14 linears" in text
    assert "longest sequence 64 (not reduced), micro-batch 2048 tokens" in text
    assert text.startswith("\n".join(report.summary_lines()) + "\n\nlayer 0: ")
    assert "unquantized modules: model.layers.1.self_attn.q_proj" in text
    assert text.count("layer ") >= 3 and "layer 1: " in text


def test_the_limit_of_sequences_and_what_they_were_reduced_to_are_told(
    source: LanguageFiles, tmp_path: Path
) -> None:
    given = replace(calibration(source, (100, 80)), seq_len=128)
    whole = quantize(source, tmp_path / "whole", given=given)
    assert "longest sequence 100 (limit 128, not reduced), micro-batch" in str(whole.lines())
    cut = quantize(source, tmp_path / "cut", given=given, build=device(64))
    assert "sequences reduced from 100 to 64 tokens (out of memory), micro-batch 64" in str(
        cut.lines()
    )


def test_tokens_that_do_not_count_are_explained(report: Report, source: LanguageFiles) -> None:
    repeated = "calibration tokens: text 122; 122 of 128 tokens count, the rest repeat what an"
    assert repeated in str(report.summary_lines())
    given = replace(calibration(source), tokens={"audio": 28, "text": 100})
    again = quantize(source, report.output.with_name("again"), given=given)
    assert "calibration tokens: audio 28, text 100" in again.summary_lines()


@pytest.mark.parametrize(("compatible", "model"), [(True, "float"), (False, "quantized")])
def test_the_model_that_losses_are_judged_on_is_told(
    compatible: bool, model: str, source: LanguageFiles, tmp_path: Path
) -> None:
    method = MethodSettings(method="rtn", group_size=32, compatible=compatible)
    report = quantize(source, tmp_path / "out", method=method)
    assert f", on what the {model} model computes" in str(report.summary_lines())


def test_the_memory_of_the_calibration_is_told(source: LanguageFiles, tmp_path: Path) -> None:
    report = run(
        source,
        calibration(source),
        METHOD,
        RunSettings(),
        tmp_path / "out",
        progress=Progress(io.StringIO()),
        build=Rounding,
        calibration_peak=Peak(5_000_000_000, 2_000_000_000),
    )
    assert report is not None
    told = "calibration: peak memory 5.00 GB, peak device memory 2.00 GB"
    assert told in report.summary_lines()
    assert report.data["measured"]["peak_ram"] < 5_000_000_000


# --- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(screen: str) -> str:
    """What a terminal shows of the last line."""
    line: list[str] = []
    for part in screen.rsplit("\n", 1)[-1].split("\r"):
        line[: len(part)] = part
    return "".join(line).rstrip()


def test_plain_lines_when_not_a_terminal(source: LanguageFiles, tmp_path: Path) -> None:
    out = io.StringIO()
    run(
        source,
        calibration(source),
        METHOD,
        RunSettings(),
        tmp_path / "out",
        progress=Progress(out),
    )
    lines = out.getvalue().splitlines()
    assert [line[:9] for line in lines if line.startswith("layer ")] == [
        "layer 1/3",
        "layer 2/3",
        "layer 3/3",
    ]
    assert "\r" not in out.getvalue()


def test_one_bar_on_a_terminal() -> None:
    out, now = Terminal(), [0.0]
    progress = Progress(out, clock=lambda: now[0])
    progress.start(4, 1)
    now[0] = 10.0
    progress.layer(2, 0.00123, Peak(1_500_000_000, 0))
    assert shown(out.getvalue()) == (
        f"[{'#' * 15}{'.' * 15}] layer 2/4 loss 0.00123, memory 1.50 GB, 20 s left"
    )
    progress.say(["layer 2: out of memory"])
    assert out.getvalue().endswith("layer 2: out of memory\n")
    progress.layer(4, None, Peak(0, 2_000_000_000))
    assert shown(out.getvalue()).endswith("layer 4/4 kept, memory 0.0 kB, device 2.00 GB, 0 s left")
    progress.finish()
    assert out.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3725, "1 h 02 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 kB"), (51_234, "51.2 kB"), (3_400_000, "3.4 MB"), (1_500_000_000, "1.50 GB")],
)
def test_sizes_are_never_rounded_to_nothing(size: int, text: str) -> None:
    assert size_text(size) == text


# --- memory


def test_the_monitor_sees_a_peak_that_is_over() -> None:
    before = resident_memory()
    seen = threading.Event()
    with MemoryMonitor(interval_s=0.001) as monitor:
        monitor.lap()
        block = bytearray(200 << 20)
        block[::4096] = b"1" * len(block[::4096])
        seen.wait(0.2)
        del block
        assert monitor.lap().ram >= before + (150 << 20)
        assert monitor.lap().ram < before + (150 << 20)
        assert monitor.total.ram >= before + (150 << 20)


def test_the_monitor_stops_with_an_error() -> None:
    with pytest.raises(RuntimeError), MemoryMonitor(interval_s=0.001):
        raise RuntimeError
    assert not [t for t in threading.enumerate() if t.name == "memory-monitor"]


def test_no_device_is_asked_when_none_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question about its memory would create a context on it."""

    def forbidden() -> int:
        raise AssertionError("asked")

    monkeypatch.setattr(torch.cuda, "memory_reserved", forbidden)
    monkeypatch.setattr(torch.cuda, "mem_get_info", forbidden)
    assert memory.device_memory() == 0
    memory.return_memory()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(AssertionError, match="asked"):
        memory.device_memory()
