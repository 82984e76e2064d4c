"""Peak memory of a run on a large OpenS2S file, of which the language model is a part.

python peak_memory.py DIR [--gigabytes 2] [--hidden 1024] [--layers 8] [--vocabulary 32000]
    [--method awq]
DIR must be empty. Prints one JSON object: bytes planned, measured, and taken before the run.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from language_model_files import calibration
from torch import Tensor

from omnispeech.checkpoint.files import build_on_meta
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.tensor_file import Layout, write_tensor_file
from omnispeech.models.qwen3 import CausalLM, Qwen3Config
from omnispeech.quantization.memory import resident_memory
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.pipeline import run
from omnispeech.quantization.plan import make_plan, work_of
from omnispeech.quantization.progress import Progress
from omnispeech.quantization.run_settings import RunSettings
from omnispeech.tiny.weights import random_tensor

PIECE = (1 << 20, 16)  # shape of the tensors that fill the file: 32 MiB
LENGTHS = (256,) * 8  # tokens of the calibration sequences


def write_unified(directory: Path, size: int, language: dict[str, Any]) -> None:
    """An OpenS2S checkpoint of `size` bytes, as far as the quantizer looks at it."""
    model = build_on_meta(lambda: CausalLM(Qwen3Config.from_dict(language)))
    shapes = {f"llm_model.{name}": tuple(t.shape) for name, t in model.state_dict().items()}
    own = sum(torch.Size(shape).numel() for shape in shapes.values()) * 2
    filling = max(0, size - own) // (torch.Size(PIECE).numel() * 2)
    layout: Layout = {name: (torch.bfloat16, shape) for name, shape in shapes.items()} | {
        f"audio_encoder_model.filling.{i}": (torch.bfloat16, PIECE) for i in range(filling)
    }

    def read(name: str) -> Tensor:
        if name not in shapes:
            return torch.zeros(PIECE, dtype=torch.bfloat16)
        return random_tensor(name, torch.Size(shapes[name]), 0).to(torch.bfloat16)

    directory.mkdir(parents=True)
    write_tensor_file(directory / "model.safetensors", layout, read)
    config = {"model_type": "omnispeech", "llm_config": language}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def measure(directory: Path, method: MethodSettings) -> dict[str, int]:
    source = LanguageFiles.open(directory, "llm")
    given = calibration(source, LENGTHS)
    settings = RunSettings(batch_tokens=512)
    output = directory.parent / "out"
    before = resident_memory()
    plan = make_plan(source, work_of(given), method, settings, output)
    report = run(source, given, method, settings, output, progress=Progress(io.StringIO()))
    assert report is not None
    return {
        "file": (directory / "model.safetensors").stat().st_size,
        "before": before,
        "planned": plan.peak_ram,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "reported": report.data["measured"]["peak_ram"],
        "read": source.bytes_read,
        "result": report.sizes[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--method", choices=["awq", "gptq", "rtn"], default="awq")
    options = parser.parse_args()
    model = options.directory / "OpenS2S"
    if model.exists():  # the process below, in which nothing was allocated before
        sys.stdout.write(json.dumps(measure(model, MethodSettings(method=options.method))) + "\n")
        return
    language = {
        "model_type": "qwen3",
        "hidden_size": options.hidden,
        "intermediate_size": 3 * options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": options.hidden // 128,
        "head_dim": 64,
        "vocab_size": options.vocabulary,
    }
    write_unified(model, int(options.gigabytes * 1e9), language)
    subprocess.run([sys.executable, __file__, *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
