"""What a start imports before it reads the first weight, and what it tells about itself."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from omnispeech.assembly import load_models, load_sources
from omnispeech.checkpoint.models_directory import DECODER, choose_sources
from omnispeech.checkpoint.opens2s import Loading
from omnispeech.engine.worker import Worker
from omnispeech.errors import CheckpointError
from omnispeech.phases import Phases, peak_memory
from omnispeech.tiny.directory import write_tiny
from omnispeech.tiny.shape import TinyShape

ROOT = Path(__file__).parent.parent
ENGINE = "omnispeech.assembly, omnispeech.engine.worker, omnispeech.server.app"


def imported(code: str) -> set[str]:
    """Top-level names of the modules that Python has after `code`."""
    code += "\nimport sys; sys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in done.stderr.split()}


HELP = """
from omnispeech.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
"""


def test_help_needs_no_library_that_takes_long_to_import() -> None:
    heavy = {"torch", "numpy", "transformers", "fastapi", "huggingface_hub", "tokenizers", "ray"}
    assert not imported(HELP) & heavy


def test_a_server_imports_nothing_that_it_does_not_serve_with() -> None:
    assert not imported(f"import {ENGINE}") & {"transformers", "huggingface_hub", "ray", "jinja2"}


@pytest.mark.parametrize("command", ["import omnispeech", HELP])
def test_the_package_and_its_help_are_there_at_once(command: str) -> None:
    """0.1 s and 0.3 s on a machine that does nothing else; the best of three, and a wide margin."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    assert min(times) < 2


def test_phases_of_a_start_come_in_order_and_tell_what_was_read(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    phases = Phases()
    loading = Loading(phases=phases)
    load_sources(choose_sources(tmp_path), torch.device("cpu"), torch.float32, loading=loading)
    assert list(phases.done()) == [
        "check checkpoint",
        "load audio encoder and adapters",
        "load LLM",
        "load speech LM",
        "load speech decoder",
        "load tokenizers",
    ]
    sizes = {name: phase.size for name, phase in phases.done().items()}
    decoder = tmp_path / "glm-4-voice-decoder"
    published = sum((decoder / name).stat().st_size for name in ("flow.pt", "hift.pt"))
    assert sizes.pop("load speech decoder") == published
    stored = sum(path.stat().st_size for path in (tmp_path / "OpenS2S").glob("*.safetensors"))
    assert stored * 0.9 < sum(sizes.values()) < stored


def test_the_last_line_of_a_start_tells_its_peak_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_tiny(tmp_path)
    sources = choose_sources(tmp_path)
    worker = Worker(lambda: load_sources(sources, torch.device("cpu"), torch.float32))
    worker.start()
    try:
        while not worker.status().ready:
            assert not worker.status().failure
            time.sleep(0.05)
    finally:
        worker.close()
    assert caplog.messages[-1].startswith("ready; peak host memory ")
    assert 1e8 < peak_memory() < 1e11


@pytest.mark.parametrize(("units", "known"), [(512, 1024), (1024, 512)])
def test_a_decoder_of_other_units_is_refused(tmp_path: Path, units: int, known: int) -> None:
    """Where it knows more of them, the replies would be noise."""
    write_tiny(tmp_path / "models", shape=TinyShape(units=units))
    write_tiny(tmp_path / "other", shape=TinyShape(units=known))
    shutil.rmtree(tmp_path / "models" / DECODER)
    (tmp_path / "other" / DECODER).rename(tmp_path / "models" / DECODER)
    told = rf"OpenS2S speaks {units} units, \S+ knows {known}; they do not belong together"
    with pytest.raises(CheckpointError, match=told):
        load_models(tmp_path / "models", torch.device("cpu"), torch.float32)
