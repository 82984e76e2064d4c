"""Our files, loaded and run by others: python tests/interop/run.py --work DIR

Builds an environment for each of them under DIR (once; gigabytes), quantizes small trained models
with our own quantizer, and lets the others compute. Exits with 1 if one of them disagrees.
"""

import argparse
import json
import re
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.byte_lm import ByteLM, read_model, write_model  # noqa: E402
from benchmarks.corpus import pieces  # noqa: E402
from benchmarks.runs import deepened  # noqa: E402
from omnispeech.calibration.samples import text_calibration  # noqa: E402
from omnispeech.checkpoint.language import LanguageFiles  # noqa: E402
from omnispeech.checkpoint.quantized import load_causal_lm, read_quantization  # noqa: E402
from omnispeech.checkpoint.shards import Shards  # noqa: E402
from omnispeech.json_file import read_json  # noqa: E402
from omnispeech.layers.packing import unpack  # noqa: E402
from omnispeech.quantization.methods.settings import MethodSettings  # noqa: E402
from omnispeech.quantization.pipeline import run as quantize  # noqa: E402
from omnispeech.quantization.run_settings import RunSettings  # noqa: E402

CPU = torch.device("cpu")
TRAINED = ROOT / "tests" / "byte_lm"
READERS = Path(__file__).parent / "readers.py"
TOLERANCE = {"float16": 0.01, "bfloat16": 0.05, "float32": 0.001}  # relative error of the logits
SAME_CHOICE = 0.95  # of the positions
COUNTS = {  # of readers that compute no logits
    "autoawq_bytes": ("equal_tensors", "tensors"),
    "vllm_config": ("equal_linears", "linears_compared"),
}

# torch first, in its build for CPUs; packages that ask for another torch come without their own
ENVIRONMENTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "autoawq": (
        ("torch==2.13.0",),
        ("transformers==4.51.3", "accelerate", "datasets", "setuptools", "wheel"),
        ("--no-deps", "--no-build-isolation", "autoawq==0.2.9"),
    ),
    "gptqmodel": (
        ("torch==2.13.0",),
        ("transformers==5.23.0", "accelerate", "optimum", "setuptools", "wheel"),
        (
            *("torch==2.13.0", "threadpoolctl", "device-smi", "protobuf", "pillow", "requests"),
            *("pypcre", "tokenicer", "logbar", "ninja", "maturin", "datasets", "pyarrow", "dill"),
            *("torchao", "defuser", "packaging"),
        ),
        ("--no-deps", "--no-build-isolation", "gptqmodel==7.7.0"),
    ),
    "compressed": (
        ("torch==2.13.0",),
        ("transformers==5.23.0", "compressed-tensors==0.20.0", "accelerate"),
    ),
    # its wheel holds kernels for CUDA only: without one, its reading of config.json can be asked
    "vllm": (
        ("torch==2.13.0",),
        ("transformers==5.23.0",),
        (
            *("torch==2.13.0", "psutil", "cachetools", "blake3", "py-cpuinfo", "pydantic", "pyzmq"),
            *("msgspec", "cloudpickle", "cbor2", "einops", "pybase64", "fastapi", "openai"),
            *("prometheus_client", "prometheus-fastapi-instrumentator", "tiktoken", "llguidance"),
            *("partial-json-parser", "jsonschema", "six", "watchfiles", "python-json-logger"),
            *("setproctitle", "aiohttp", "uvloop", "sentencepiece", "orjson", "ijson", "lark"),
            *("oss-harmony", "outlines_core", "xgrammar", "mcp", "compressed-tensors==0.20.0"),
            *("model-hosting-container-standards", "protobuf", "pillow", "ninja"),
        ),
        ("--no-deps", "vllm==0.33.0"),
    ),
}


@dataclass(frozen=True, slots=True)
class Reading:
    environment: str
    reader: str
    variant: str  # dtype, or the layout whose bytes are compared


AUTOAWQ = Reading("autoawq", "autoawq", "float16")
TRANSFORMERS = Reading("gptqmodel", "transformers", "float16")
TRANSFORMERS_BF16 = Reading("gptqmodel", "transformers", "bfloat16")
GPTQMODEL = Reading("gptqmodel", "gptqmodel", "float16")
COMPRESSED = Reading("compressed", "compressed_tensors", "float32")
VLLM = Reading("vllm", "vllm_config", "-")
EVERYONE = (AUTOAWQ, TRANSFORMERS, TRANSFORMERS_BF16, GPTQMODEL, COMPRESSED, VLLM)


def bytes_of(layout: str) -> tuple[Reading, ...]:
    return (Reading("autoawq", "autoawq_bytes", layout),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    method: MethodSettings
    readers: tuple[Reading, ...]
    settings: RunSettings = field(default_factory=RunSettings)
    model: str = "plain"


CASES: Mapping[str, Case] = {
    "awq g64": Case(method=MethodSettings(group_size=64), readers=EVERYONE),
    "awq g128": Case(method=MethodSettings(group_size=128), readers=EVERYONE),
    "awq g64, zero point off": Case(
        method=MethodSettings(group_size=64, zero_point=False), readers=EVERYONE
    ),
    "awq g64, tied head": Case(
        method=MethodSettings(group_size=64), readers=EVERYONE, model="tied"
    ),
    # AutoAWQ leaves out modules by names inside a layer only: it cannot keep layer 1
    "awq g64, layers 1 and -1 of 12 kept": Case(
        method=MethodSettings(group_size=64),
        settings=RunSettings(keep_fp_layers=(1, -1)),
        readers=EVERYONE[1:],
        model="deep",
    ),
    "gptq 8 bit g128": Case(
        method=MethodSettings(method="gptq", bits=8, group_size=128),
        readers=(TRANSFORMERS, GPTQMODEL),
    ),
    "gptq 4 bit g128": Case(
        method=MethodSettings(method="gptq", bits=4, group_size=128),
        readers=(TRANSFORMERS, GPTQMODEL),
    ),
    "gptq 4 bit g64, act-order": Case(
        method=MethodSettings(method="gptq", bits=4, group_size=64, desc_act=True),
        readers=(TRANSFORMERS, GPTQMODEL),
    ),
    "gptq 8 bit g128, layers 1 and -1 of 12 kept": Case(
        method=MethodSettings(method="gptq", bits=8, group_size=128),
        settings=RunSettings(keep_fp_layers=(1, -1)),
        readers=(TRANSFORMERS, GPTQMODEL),
        model="deep",
    ),
    "awq gemv g64": Case(
        method=MethodSettings(group_size=64),
        settings=RunSettings(layout="gemv"),
        readers=bytes_of("gemv"),
    ),
    "awq gemv g128": Case(
        method=MethodSettings(group_size=128),
        settings=RunSettings(layout="gemv"),
        readers=bytes_of("gemv"),
    ),
    "awq gemv_fast g64": Case(
        method=MethodSettings(group_size=64),
        settings=RunSettings(layout="gemv_fast"),
        readers=bytes_of("gemv_fast"),
    ),
    "awq gemv_fast g128": Case(
        method=MethodSettings(group_size=128),
        settings=RunSettings(layout="gemv_fast"),
        readers=bytes_of("gemv_fast"),
    ),
}


def build_environment(name: str, folder: Path) -> None:
    """Nothing to do if it is complete."""
    done = folder / "complete"
    if done.exists():
        return
    venv.create(folder, with_pip=True, clear=True)
    for packages in ENVIRONMENTS[name]:
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *packages]
        subprocess.run(command, check=True)
    done.touch()


def tied(model: ByteLM) -> ByteLM:
    weights = {name: w for name, w in model.weights.items() if name != "lm_head.weight"}
    # an embedding is read one row at a time, a head needs rows of one scale
    weights["model.embed_tokens.weight"] = model.weights["lm_head.weight"]
    return ByteLM({**model.raw, "tie_word_embeddings": True}, weights)


MODELS: Mapping[str, Callable[[ByteLM], ByteLM]] = {
    "plain": lambda model: model,
    "tied": tied,
    "deep": lambda model: deepened(model, 12),
}


def make(case: Case, folder: Path) -> None:
    """folder/model and folder/reference.safetensors."""
    write_model(MODELS[case.model](read_model(TRAINED)), folder / "source", torch.float16)
    source = LanguageFiles.open(folder / "source")
    heard = text_calibration(
        source, pieces("calibration", 32, 128, 0).tolist(), seq_len=128, max_tokens=4096
    )
    settings = replace(case.settings, overwrite=True)
    quantize(source, heard, case.method, settings, folder / "model")
    save_file(reference(folder / "model"), folder / "reference.safetensors")


def reference(directory: Path) -> dict[str, Tensor]:
    """Logits of the dequantized weights in float32, and these weights one by one."""
    ids = pieces("evaluation", 1, 256, 1)[0]
    model = load_causal_lm(directory, CPU, torch.float32, "reference")
    with torch.inference_mode():
        cache = model.new_cache(len(ids))
        row = cache.allocate(len(ids))
        states = model(model.embed(ids), cache, cache.layout([(row, len(ids))]))
        logits = model.lm_head(states)
    return {"ids": ids, "logits": logits.clone()} | stored_weights(directory)


def stored_weights(directory: Path) -> dict[str, Tensor]:
    quantization = read_quantization(read_json(directory / "config.json"))
    assert quantization is not None
    shards, parts = Shards(directory, CPU), ("qweight", "qzeros", "scales", "g_idx")
    weights: dict[str, Tensor] = {}
    for name in [n.removesuffix(".qweight") for n in shards.names if n.endswith(".qweight")]:
        tensors = {
            part: shards.read(f"{name}.{part}", CPU, torch.float16)
            for part in parts
            if f"{name}.{part}" in shards.names
        }
        weight = unpack(tensors, quantization.scheme)
        weights[f"{name}.weight"] = weight.dequantize(torch.float16).contiguous()
        weights[f"{name}.scales"] = weight.scales.contiguous()
        weights[f"{name}.zeros"] = weight.zeros.to(torch.float16).contiguous()
    return weights


def read(reading: Reading, python: Path, folder: Path) -> dict[str, Any]:
    files = [str(folder / "model"), str(folder / "reference.safetensors")]
    command = [str(python), str(READERS), reading.reader, *files, reading.variant]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or ["it said nothing"]
        return {"failure": lines[-1]}
    answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return answer


def agrees(reading: Reading, answer: Mapping[str, Any]) -> bool:
    if "failure" in answer:
        return False
    if reading.reader in COUNTS:
        equal, compared = (answer[key] for key in COUNTS[reading.reader])
        return bool(equal == compared > 0)
    close = answer["relative_error"] <= TOLERANCE[reading.variant]
    return bool(close and answer["same_choice"] >= SAME_CHOICE)


def line(case: str, reading: Reading, answer: Mapping[str, Any]) -> str:
    if "failure" in answer:
        result = answer["failure"][:200]
    elif reading.reader in COUNTS:
        equal, compared = (answer[key] for key in COUNTS[reading.reader])
        result = f"{equal} of {compared} equal"
    else:
        result = f"{answer['relative_error']:.1e}, {answer['same_choice']:.3f}"
    verdict = "yes" if agrees(reading, answer) else "NO"
    return (
        f"| {case} | {reading.reader}, {reading.variant} | {answer.get('linear', '')} | "
        f"{result} | {verdict} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="environments and models")
    parser.add_argument("--only", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS))
    parser.add_argument("--cases", nargs="+", default=[""], help="parts of the names of files")
    args = parser.parse_args()
    work = args.work.absolute()
    for name in args.only:
        build_environment(name, work / name)
    rows = ["| files | read by | linears | error, same choice | agrees |", "|---|---|---|---|---|"]
    wrong = 0
    chosen = [name for name in CASES if any(part in name for part in args.cases)]
    for name in chosen:
        case, folder = CASES[name], work / "models" / re.sub(r"\W+", "-", name)
        make(case, folder)
        for reading in case.readers:
            if reading.environment in args.only:
                answer = read(reading, work / reading.environment / "bin" / "python", folder)
                wrong += not agrees(reading, answer)
                rows.append(line(name, reading, answer))
                sys.stderr.write(f"{rows[-1]}\n")
    sys.stdout.write("\n".join(rows) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
