"""What models take, computed from headers, against what they hold once they are loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantized_models import quantize_language_model, quantize_opens2s
from safetensors.torch import load_file, save_file

from omnispeech.assembly import load_sources
from omnispeech.checkpoint.files import held_bytes
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import choose_sources
from omnispeech.checkpoint.shards import weight_files
from omnispeech.checkpoint.sizes import (
    PARTS,
    cache_sizes,
    decoder_size,
    encoder_size,
    models_size,
    weight_sizes,
)
from omnispeech.checkpoint.weight_plan import Target
from omnispeech.engine.runner import Runner
from omnispeech.errors import CheckpointError
from omnispeech.tiny.directory import write_tiny
from omnispeech.tiny.shape import LanguageShape, TinyShape

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint, and what can be made of it."""
    path = tmp_path_factory.mktemp("sizes") / "models"
    write_tiny(path)
    source = path / "OpenS2S"
    quantize_language_model(source, path / "OpenS2S-llm-awq")
    quantize_language_model(source, path / "OpenS2S-speech-lm-awq", part="speech_lm")
    quantize_opens2s(source, path / "OpenS2S-8bit")
    for name in ("OpenS2S-llm-awq", "OpenS2S-speech-lm-awq", "OpenS2S-8bit"):
        Manifest(path).enter(name, {})
    return path


@pytest.mark.parametrize("kernel", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("llm", "speech_lm"), [("bf16", "bf16"), ("awq", "bf16"), ("awq", "awq"), ("8bit", "bf16")]
)
def test_sizes_are_those_of_the_loaded_models(
    models: Path, llm: str, speech_lm: str, dtype: torch.dtype, kernel: str
) -> None:
    sources = choose_sources(models, llm, speech_lm)
    loaded = load_sources(sources, CPU, dtype, kernel=kernel)
    held: dict[str, int] = {}
    for name, module in loaded.language.lm.named_children():
        held[PARTS[name]] = held.get(PARTS[name], 0) + held_bytes(module)
    sizes = weight_sizes(sources, Target(CPU, dtype, kernel))
    assert sizes == pytest.approx(held, rel=0.02)
    decoder = held_bytes(loaded.decoder.flow) + held_bytes(loaded.decoder.hift)
    assert decoder_size(sources.decoder) == decoder
    assert models_size(sources, Target(CPU, dtype, kernel)) == pytest.approx(
        sum(held.values()) + decoder, rel=0.02
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_the_caches_are_those_of_the_engine(models: Path, dtype: torch.dtype) -> None:
    sources = choose_sources(models, "bf16")
    runner = Runner(load_sources(sources, CPU, dtype).language, 640)
    held = [c.keys.nbytes + c.values.nbytes for c in (runner.llm_cache, runner.speech_cache)]
    assert list(cache_sizes(sources.base, 640, dtype).values()) == held


def test_the_encoder_is_what_calibration_loads(models: Path) -> None:
    target = Target(CPU, torch.float32)
    sizes = weight_sizes(choose_sources(models, "bf16"), target)
    assert encoder_size(models / "OpenS2S", target) == (
        sizes["audio encoder"] + sizes["audio adapter"]
    )


def test_a_tied_head_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    write_tiny(tmp_path, shape=TinyShape(shards=1))
    target = Target(CPU, torch.float32)
    before = weight_sizes(choose_sources(tmp_path), target)["LLM"]
    (path,) = weight_files(tmp_path / "OpenS2S")
    weights = load_file(path)
    head = weights.pop("llm_model.lm_head.weight")
    path.unlink()
    (tmp_path / "OpenS2S/model.safetensors.index.json").unlink(missing_ok=True)
    save_file(weights, tmp_path / "OpenS2S/model.safetensors")
    config = json.loads((tmp_path / "OpenS2S/config.json").read_text())
    config["llm_config"]["tie_word_embeddings"] = True
    (tmp_path / "OpenS2S/config.json").write_text(json.dumps(config))
    assert weight_sizes(choose_sources(tmp_path), target)["LLM"] == before - 4 * head.numel()


def test_sizes_of_damaged_files_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    shard = sorted((tmp_path / "OpenS2S").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged"):
        weight_sizes(choose_sources(tmp_path), Target(CPU, torch.float32))


LOADS = """
import sys
from pathlib import Path
import torch
from omnispeech.assembly import load_sources
from omnispeech.checkpoint.models_directory import choose_sources
from omnispeech.quantization.memory import resident_memory

cpu = torch.device("cpu")
small, large = (choose_sources(Path(path)) for path in sys.argv[1:])
kept = [load_sources(small, cpu, torch.float32)]  # what loads once, whatever the size
before = resident_memory()
kept.append(load_sources(large, cpu, torch.float32))
print(resident_memory() - before)
"""


def test_the_process_grows_by_what_was_computed(tmp_path: Path) -> None:
    wide = LanguageShape(hidden=768, inner=2048, layers=3, heads=8, kv_heads=2, head_width=64)
    write_tiny(tmp_path / "small")
    write_tiny(tmp_path / "large", shape=TinyShape(llm=wide))
    command = [sys.executable, "-c", LOADS, str(tmp_path / "small"), str(tmp_path / "large")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    size = models_size(choose_sources(tmp_path / "large"), Target(CPU, torch.float32))
    assert size > 64 << 20
    buffers = 48 << 20  # of the threads that read
    assert 0.95 * size < grown < 1.1 * size + buffers
