"""What is quantized of a model, and how: each in a models directory of its own, by our commands."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.hardware import say
from omnispeech.assembly import language_models
from omnispeech.checkpoint.models_directory import DECODER, OPENS2S, Sources, choose_sources
from omnispeech.checkpoint.opens2s import load_opens2s
from omnispeech.checkpoint.shards import Shards
from omnispeech.engine.runner import LanguageModels

ROOT = Path(__file__).parent.parent
PREFIXES = ("llm_model.", "tts_lm_model.")
CPU = torch.device("cpu")

LLM = ("quantize_llm_awq.py",)
SPEECH_LM = (*LLM, "--part", "speech_lm")
CALIBRATION = "QUESTIONS"  # stands for a directory of questions of the domain
DOMAIN = ("--calib", CALIBRATION)
RECIPE = ("--compatible", *DOMAIN)
FINE = ("--q-group-size", "32", *DOMAIN)
QUANTIZED: dict[str, Sequence[tuple[str, ...]]] = {  # models directories, and what fills them
    "original": (),
    "8-bit": [("quantize_model_once.py",)],
    "gptq-8-bit": [(*LLM, "--gptq", *DOMAIN)],
    "gptq": [(*LLM, "--gptq", "--bits", "4", *DOMAIN)],
    "recipe": [(*LLM, *RECIPE), (*SPEECH_LM, *RECIPE)],
    "awq": [(*LLM, *DOMAIN), (*SPEECH_LM, *DOMAIN)],
    "groups-of-32": [(*LLM, *FINE), (*SPEECH_LM, *FINE)],
    "shipped-set": [LLM, SPEECH_LM],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A models directory, and with what of it the server is started."""

    directory: str = "original"
    llm: str = "bf16"
    speech_lm: str = "bf16"
    dtype: torch.dtype = torch.float32  # of what is not quantized


def both(directory: str) -> Variant:
    return Variant(directory=directory, llm="awq", speech_lm="awq")


FLOAT = "bf16"
VARIANTS = {
    FLOAT: Variant(),
    "bf16, computed in bf16": Variant(dtype=torch.bfloat16),
    "both in 8 bits": Variant(directory="8-bit", llm="8bit"),
    "LLM, GPTQ 8 bits": Variant(directory="gptq-8-bit", llm="gptq"),
    "LLM, GPTQ 4 bits": Variant(directory="gptq", llm="gptq"),
    "LLM, AutoAWQ's recipe": Variant(directory="recipe", llm="awq"),
    "LLM, AWQ": Variant(directory="awq", llm="awq"),
    "speech LM, AutoAWQ's recipe": Variant(directory="recipe", speech_lm="awq"),
    "speech LM, AWQ": Variant(directory="awq", speech_lm="awq"),
    "both, AutoAWQ's recipe": both("recipe"),
    "both, AWQ": both("awq"),
    "both, AWQ, groups of 32": both("groups-of-32"),
    "LLM, AWQ, shipped set": Variant(directory="shipped-set", llm="awq"),
    "speech LM, AWQ, shipped set": Variant(directory="shipped-set", speech_lm="awq"),
    "both, AWQ, shipped set": both("shipped-set"),
}


def make(
    commands: Sequence[tuple[str, ...]],
    original: Path,
    directory: Path,
    calibration: Callable[[], Path],
) -> None:
    """`directory` becomes a models directory: a copy of the original, and what is quantized of it.

    What is there already is not made again. Raises SystemExit where a command fails.
    """
    if directory.exists():
        return
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in (OPENS2S, DECODER):
        shutil.copytree(original / name, partial / name)
    for script, *flags in commands:
        given = [str(calibration()) if flag == CALIBRATION else flag for flag in flags]
        _run([script, "--models", str(partial), *given], directory.with_suffix(".log"))
    partial.rename(directory)


def _run(command: Sequence[str], log: Path) -> None:
    say(f"python {' '.join(command)}")
    with log.open("ab") as file:
        script = [sys.executable, str(ROOT / command[0]), *command[1:]]
        if status := subprocess.call(script, stdout=file, stderr=file, cwd=ROOT):
            raise SystemExit(f"bench.py: {command[0]} ended with {status}; see {log}")


def load(variant: Variant, directory: Path) -> LanguageModels:
    """As the server loads it on a CPU, but for the speech decoder."""
    sources = choose_sources(directory, variant.llm, variant.speech_lm)
    loaded = load_opens2s(
        sources.base, CPU, variant.dtype, llm=sources.llm, speech_lm=sources.speech_lm
    )
    return language_models(sources.base, loaded)


def language_bytes(variant: Variant, directory: Path) -> int:
    """Of both language models as they are stored, heads and embeddings included."""
    sources = choose_sources(directory, variant.llm, variant.speech_lm)
    return sum(_part_bytes(sources, prefix) for prefix in PREFIXES)


def _part_bytes(sources: Sources, prefix: str) -> int:
    own = sources.llm if prefix == PREFIXES[0] else sources.speech_lm
    files = Shards(own or sources.base, CPU)
    names = [name for name in files.names if own or name.startswith(prefix)]
    return sum(torch.Size(files.shape(n)).numel() * files.dtype(n).itemsize for n in names)
