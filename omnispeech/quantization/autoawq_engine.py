"""AutoAWQ itself, run on the language model alone: another engine with the same options.

It needs the whole model in memory and hears no sound: calibration is text. What it writes is read
back, compared with what it held in memory, and gets a config.json that all loaders understand.
"""

import hashlib
import importlib
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.shards import Shards
from omnispeech.errors import CheckpointError, ConfigError, OmniSpeechError
from omnispeech.json_file import read_json
from omnispeech.quantization.memory import MemoryMonitor, available_memory
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.output import (
    Piece,
    check_place,
    check_replaceable,
    is_filled,
    sync_tree,
    write_configs,
    write_json,
    write_shards,
)
from omnispeech.quantization.progress import duration
from omnispeech.quantization.report import JSON, LOG, versions
from omnispeech.quantization.run_settings import RunSettings
from omnispeech.quantization.state import WorkDirectory, different, give_name, put_back

INSTALL = "pip install accelerate datasets tqdm setuptools wheel && " + (
    "pip install --no-deps --no-build-isolation autoawq==0.2.9"
)
HALF = 2  # bytes: AutoAWQ computes in float16
ROOM = 1.3  # times the weights that it takes at least
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AutoAWQJob:
    """What AutoAWQ is asked for. samples: token ids, none longer than `seq_len`, which it drops."""

    source: LanguageFiles
    samples: Sequence[Sequence[int]]
    method: MethodSettings
    settings: RunSettings
    seq_len: int

    def options(self) -> dict[str, Any]:
        """Arguments of AutoAWQ's `quantize`."""
        config: dict[str, Any] = {
            "zero_point": True,
            "q_group_size": self.method.group_size,
            "w_bit": self.method.bits,
            "version": self.settings.layout or "gemm",
        }
        if self.settings.modules_to_not_convert:
            config["modules_to_not_convert"] = list(self.settings.modules_to_not_convert)
        return {
            "quant_config": config,
            "calib_data": [list(sample) for sample in self.samples],
            "duo_scaling": self.method.duo == "on",
            "apply_clip": self.method.apply_clip is not False,
            "n_parallel_calib_samples": max(1, self.settings.batch_tokens // self.seq_len),
            "max_calib_samples": len(self.samples),
            "max_calib_seq_len": self.seq_len,
        }

    def signature(self) -> dict[str, Any]:
        """What decides the result."""
        options = self.options()
        ids = json.dumps(options.pop("calib_data"))
        del options["n_parallel_calib_samples"]
        return {
            "engine": "autoawq",
            "source": self.source.fingerprint(),
            "calibration": hashlib.sha256(ids.encode()).hexdigest(),
            **options,
        }


def run_autoawq(job: AutoAWQJob, output: Path) -> Mapping[str, Any] | None:
    """Quantizes into `output`; gives what is in its report, None after a dry run.

    A result that is there already is checked, and then reported as found. Raises ConfigError if
    AutoAWQ is not installed, the model does not fit, or another result is in the way, and
    CheckpointError if AutoAWQ fails or its files are not what it held in memory.
    """
    check_place(output.absolute(), job.source.directory)
    if job.settings.overwrite:
        check_replaceable(output)
    Manifest(output.parent).names()  # one that cannot be read is told before the work
    awq = _import_awq()
    _check_memory(job.source)
    signature = job.signature()
    if job.settings.dry_run:
        return None
    put_back(output)
    if is_filled(output) and not job.settings.overwrite:
        return _existing(output, signature)
    began = time.monotonic()
    with WorkDirectory.open(output, signature, restart=True) as work, MemoryMonitor() as monitor:
        model = _quantized(awq, job, work.path / "extracted")
        _save(model, job, work.result)
        data = {
            "engine": f"AutoAWQ {_version()}",
            "signature": signature,
            "calibration": {"tokens": {"text": sum(map(len, job.samples))}},
            "sequence_length": job.seq_len,
            "compared": _check_stored(model, work.result),
            "versions": versions(),
            "measured": {"seconds": time.monotonic() - began, **asdict(monitor.total)},
        }
        _report(work.result, data)
        give_name(work.result, output)
        work.remove()
    Manifest(output.parent).enter(output.name, signature)
    return data


def extract(source: LanguageFiles, directory: Path, shard_size: int) -> None:
    """The language model as a directory of its own, tensor by tensor, as it is stored."""
    directory.mkdir()
    layers = range(source.config.num_hidden_layers)
    names = [*source.outside_names(), *(n for i in layers for n in source.layer_names(i))]
    pieces = [
        Piece(name, source.dtype(name), source.shape(name), _reader(source, name)) for name in names
    ]
    write_shards(directory, pieces, shard_size)
    write_json(directory / "config.json", source.raw)
    for file in source.tokenizer_files():
        shutil.copyfile(file, directory / file.name)


def _reader(source: LanguageFiles, name: str) -> Callable[[], Tensor]:
    return lambda: source.read(name, source.dtype(name))


def _import_awq() -> Any:
    try:
        return importlib.import_module("awq")
    except ImportError as exc:
        raise ConfigError(
            f"AutoAWQ cannot be imported ({exc}); run: {INSTALL} - or use --engine native, "
            "which needs nothing and writes the same files"
        ) from exc


def _version() -> str:
    try:
        return importlib.metadata.version("autoawq")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _check_memory(source: LanguageFiles) -> None:
    """The whole model is kept in float16."""
    layers = range(source.config.num_hidden_layers)
    names = [*source.outside_names(), *(n for i in layers for n in source.layer_names(i))]
    size = sum(torch.Size(source.shape(name)).numel() for name in names) * HALF
    if size * ROOM > (free := available_memory()):
        raise ConfigError(
            f"AutoAWQ needs {size_text(round(size * ROOM))} of memory, {size_text(free)} are free; "
            "--engine native takes one layer at a time"
        )


def _existing(output: Path, signature: Mapping[str, Any]) -> dict[str, Any]:
    try:
        data = read_json(output / JSON)
        made = data["signature"]
    except (CheckpointError, KeyError) as exc:
        raise ConfigError(
            f"{output} is there already and was not finished by this program; add --overwrite"
        ) from exc
    if differences := different(made, json.loads(json.dumps(signature))):
        raise ConfigError(
            f"{output} is there already and is not what is asked for: {'; '.join(differences)}; "
            "add --overwrite to replace it"
        )
    Manifest(output.parent).check(output.name, deep=True)
    return {**data, "found": True}


def _quantized(awq: Any, job: AutoAWQJob, directory: Path) -> Any:
    """AutoAWQ's model. What was extracted for it is gone again, whatever happens."""
    from transformers import PreTrainedTokenizerFast

    try:
        extract(job.source, directory, job.settings.shard_size)
        model = awq.AutoAWQForCausalLM.from_pretrained(
            str(directory), device_map="cpu", trust_remote_code=False
        )
        # it reads token ids, and a tokenizer only for the sake of its signature
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))  # type: ignore[no-untyped-call]
        model.quantize(tokenizer, **job.options())
    except (OmniSpeechError, OSError):
        raise
    except Exception as exc:  # AutoAWQ raises nothing narrower
        raise CheckpointError(
            f"AutoAWQ failed with {type(exc).__name__}: {exc}; its search for ranges takes linears "
            "of a multiple of 64 outputs alone (--no-apply_clip does without), "
            "--engine native takes any"
        ) from exc
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return model


def _save(model: Any, job: AutoAWQJob, directory: Path) -> None:
    """AutoAWQ's files, but our config.json: its own is in a spelling that old loaders misread."""
    model.save_quantized(str(directory), shard_size=f"{job.settings.shard_size // 1000}KB")
    quantization = read_json(directory / "config.json").get("quantization_config")
    if not isinstance(quantization, dict):
        raise CheckpointError(f"AutoAWQ wrote no quantization_config into {directory}")
    write_configs(directory, job.source.raw, quantization)
    for file in job.source.tokenizer_files():
        shutil.copyfile(file, directory / file.name)
    for file in directory.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors lets only the owner read


def _check_stored(model: Any, directory: Path) -> int:
    """How many tensors were compared; a tied head is in memory twice and on disk once."""
    held: dict[str, Tensor] = model.model.state_dict()
    files = Shards(directory, CPU)
    for name in files.names:
        stored = files.read(name, CPU, files.dtype(name))
        if name not in held or not torch.equal(stored, held[name].cpu()):
            raise CheckpointError(f"{name} of {directory} is not what AutoAWQ held in memory")
        if not stored.isfinite().all():
            raise CheckpointError(f"AutoAWQ made {name} not finite; use --engine native")
    places = {held[name].data_ptr() for name in files.names}
    if lost := [n for n in held.keys() - files.names if held[n].data_ptr() not in places]:
        raise CheckpointError(f"{directory} lacks {min(lost)}, which AutoAWQ held in memory")
    return len(files.names)


def _report(directory: Path, data: Mapping[str, Any]) -> None:
    write_json(directory / JSON, dict(data))
    (directory / LOG).write_text("\n".join(report_lines(data)) + "\n", encoding="utf-8")
    sync_tree(directory)


def report_lines(data: Mapping[str, Any]) -> list[str]:
    return [
        f"engine {data['engine']}, calibrated on text alone",
        f"calibration tokens: text {data['calibration']['tokens']['text']}",
        f"longest sequence {data['sequence_length']}",
        f"loaded back: {data['compared']} tensors as AutoAWQ held them",
        f"time {duration(data['measured']['seconds'])}, peak memory "
        f"{size_text(data['measured']['ram'])}",
    ]
