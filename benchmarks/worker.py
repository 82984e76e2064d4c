"""One quantization in a process of its own: python -m benchmarks.worker JOB.json

Prints one line of JSON: seconds from opening the source to the verified result, and peak memory.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnispeech.calibration.samples import text_calibration
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.pipeline import run
from omnispeech.quantization.run_settings import RunSettings


def quantize(job: Mapping[str, Any]) -> None:
    """job: source, part, output, ids (lists of token ids), method (settings)."""
    source = LanguageFiles.open(Path(job["source"]), job["part"])
    length = max(len(ids) for ids in job["ids"])
    tokens = sum(len(ids) for ids in job["ids"])
    heard = text_calibration(source, job["ids"], seq_len=length, max_tokens=tokens)
    settings = RunSettings(batch_tokens=job.get("batch_tokens", 2048))
    run(source, heard, MethodSettings(**job["method"]), settings, Path(job["output"]))


def peak_memory() -> int:
    """Bytes. Of this process alone: ru_maxrss would begin with the size of the one that forked."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    before, began = peak_memory(), time.perf_counter()
    quantize(job)
    result = {
        "seconds": time.perf_counter() - began,
        "peak_bytes": peak_memory(),
        "imports_bytes": before,
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
