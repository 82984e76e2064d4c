"""AutoAWQ itself, in an environment that has it: PYTHON autoawq_worker.py JOB.json

Imports nothing of ours. Prints the same line as `worker.py`, for the same job.
"""

import importlib
import json
import sys
import time
from pathlib import Path


def peak_memory() -> int:
    """Bytes, of this process alone."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    awq, transformers = (importlib.import_module(name) for name in ("awq", "transformers"))
    before, began = peak_memory(), time.perf_counter()
    model = awq.AutoAWQForCausalLM.from_pretrained(job["source"], device_map="cpu")
    model.quantize(
        transformers.AutoTokenizer.from_pretrained(job["source"]),
        quant_config={
            "zero_point": True,
            "q_group_size": job["method"]["group_size"],
            "w_bit": 4,
            "version": "GEMM",
        },
        calib_data=job["ids"],
        max_calib_samples=len(job["ids"]),
        max_calib_seq_len=max(len(ids) for ids in job["ids"]),
    )
    model.save_quantized(job["output"])
    result = {
        "seconds": time.perf_counter() - began,
        "peak_bytes": peak_memory(),
        "imports_bytes": before,
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
