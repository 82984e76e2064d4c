"""What an interrupted run leaves behind, from which the same command goes on.

`<output>.partial` holds the signature of the run, one file and one record for each finished
layer, and the hidden states in front of the next one. The states are kept, not computed again:
a second computation is not the same to the last bit (spec: quantization 1.3). Every file appears
whole; the states come last and say how many layers count.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from omnispeech.checkpoint.files import replace_file
from omnispeech.checkpoint.tensor_file import TensorFile, write_tensor_file
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.json_file import read_json
from omnispeech.quantization.output import write_json
from omnispeech.quantization.selection import kept_text

FORMAT = 1  # of the partial directory; another one is not continued
SIGNATURE, STREAMS, RESULT = "signature.json", "streams.safetensors", "result"
UNREADABLE = {  # entries of a signature that mean nothing to a reader
    "calibration": "the calibration data differ (--calib, --seq_len, --max-tokens)",
    "source": "the model is not the same, or its files have changed",
    "data": "the audio, or how it is divided, differs (--data, --hold-out, --seed)",
    "sources.encoder": "the audio encoder of OpenS2S is not the same, or its files have changed",
    "sources.wavlm": "WavLM is not the same, or its files have changed",
}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Streams:
    """Hidden states [T, D] of every sequence in front of layer `done`, on the host."""

    done: int  # layers behind them
    batch_tokens: int
    counted: Sequence[Tensor]  # [T] bool
    floats: Sequence[Tensor]
    quantized: Sequence[Tensor]

    @property
    def longest(self) -> int:
        return max(map(len, self.floats))


class WorkDirectory:
    """One run owns it at a time; made by `WorkDirectory.open`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextmanager
    def open(
        cls, output: Path, signature: Mapping[str, Any], *, restart: bool = False
    ) -> Iterator["WorkDirectory"]:
        """signature: what decides the result.

        Raises ConfigError if another run has it open, or if an earlier one had another signature.
        """
        path = partial_path(output)
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if restart:
                _empty(path)
            work = cls(path)
            work._clean()
            work._sign(_signed(signature))
            yield work

    @property
    def result(self) -> Path:
        """Where the final directory is put together."""
        return self.path / RESULT

    def layer_file(self, index: int) -> Path:
        return self.path / f"layer-{index:05}.safetensors"

    def record_file(self, index: int) -> Path:
        return self.path / f"layer-{index:05}.json"

    def save_layer(self, index: int, tensors: Mapping[str, Tensor], record: Any) -> None:
        """Finished only when `save_streams` counts it."""
        write_tensors(self.layer_file(index), tensors)
        write_json(self.record_file(index), record)

    def salient_file(self, index: int) -> Path:
        return self.path / f"salient-{index:05}.safetensors"

    def save_salient(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """What lies beside the model, where the method was asked for it."""
        write_tensors(self.salient_file(index), tensors)

    def records(self, count: int) -> list[dict[str, Any]]:
        return [read_json(self.record_file(i)) for i in range(count)]

    def save_streams(self, streams: Streams) -> None:
        tensors = {
            f"{kind}.{i:06}": tensor
            for kind in ("counted", "floats", "quantized")
            for i, tensor in enumerate(getattr(streams, kind))
        }
        metadata = {"done": str(streams.done), "batch_tokens": str(streams.batch_tokens)}
        write_tensors(self.path / STREAMS, tensors, metadata)
        sync_directory(self.path)

    def streams(self) -> Streams | None:
        """None: nothing was finished yet."""
        if not (self.path / STREAMS).is_file():
            return None
        file = TensorFile(self.path / STREAMS)
        count = len(file.entries) // 3
        return Streams(
            done=int(file.metadata["done"]),
            batch_tokens=int(file.metadata["batch_tokens"]),
            counted=[file.read(f"counted.{i:06}") for i in range(count)],
            floats=[file.read(f"floats.{i:06}") for i in range(count)],
            quantized=[file.read(f"quantized.{i:06}") for i in range(count)],
        )

    def remove(self) -> None:
        _empty(self.path)
        self.path.rmdir()

    def _clean(self) -> None:
        """Removes what a killed write left half done."""
        for path in self.path.glob(".*.partial"):
            path.unlink()
        shutil.rmtree(self.result, ignore_errors=True)

    def _sign(self, signature: Mapping[str, Any]) -> None:
        file = self.path / SIGNATURE
        if not file.is_file() or not any(self.path.glob("*.safetensors")):  # nothing was done yet
            _empty(self.path)
            write_json(file, signature)
            return
        if differences := different(read_json(file), signature):
            raise ConfigError(
                f"{self.path} is of an interrupted run that is not this one: "
                f"{'; '.join(differences)}; run that one again to finish it, or add --restart to "
                "throw it away"
            )


def remove_partial(output: Path, signature: Mapping[str, Any]) -> None:
    """What a run with this signature has left though its result is finished."""
    path = partial_path(output)
    if not path.is_dir():
        return
    with _locked(path):
        if partial_differences(output, signature) == []:
            _empty(path)
        if not any(path.iterdir()):
            path.rmdir()


def partial_differences(output: Path, signature: Mapping[str, Any]) -> list[str] | None:
    """Of the run that was interrupted there from one with `signature`; None: there was none."""
    file = partial_path(output) / SIGNATURE
    if not file.is_file():
        return None
    try:
        return different(read_json(file), _signed(signature))
    except CheckpointError as exc:
        return [str(exc)]


def _signed(signature: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples become lists."""
    signed: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **signature}))
    return signed


def place_of(output: Path) -> Path:
    """Where the directory itself lies: behind the link, if `output` is one."""
    return output.resolve() if output.is_symlink() else output


def partial_path(output: Path) -> Path:
    place = place_of(output)
    return place.with_name(f"{place.name}.partial")


def give_name(result: Path, output: Path) -> None:
    """An older result goes only when the new one has its name; see `put_back`."""
    place, replaced = place_of(output), _replaced_path(output)
    put_back(output)
    if place.exists():
        os.rename(place, replaced)
    os.rename(result, place)
    sync_directory(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def put_back(output: Path) -> None:
    """Ends what was stopped within `give_name`: an older result without its name has it again."""
    place, replaced = place_of(output), _replaced_path(output)
    if not replaced.is_dir():
        return
    if place.is_dir() and any(place.iterdir()):
        shutil.rmtree(replaced)
    else:
        os.rename(replaced, place)


def _replaced_path(output: Path) -> Path:
    place = place_of(output)
    return place.with_name(f".{place.name}.replaced")


def different(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two signatures differ, in words: "method.bits was 4 and is 8"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line
            for key in keys
            for line in different(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
        ]
    if old == new:
        return []
    if name == "kept":
        old, new = (kept_text(names or []) for names in (old, new))
        return [f"kept in float16 was {old} and is {new}"]
    return [UNREADABLE.get(name, f"{name} was {old} and is {new}")]


@contextmanager
def full_disk_is_an_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(
            f"no room is left on the disk of {path} ({exc.strerror}); make room and start the same "
            "command again, what is finished is kept"
        ) from exc


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        except BlockingIOError:
            mine = False
        if not mine:  # or the run that had it has just finished and removed it
            raise ConfigError(
                f"another run is working in {path}; wait for it, or name another output"
            )
        yield
    finally:
        os.close(descriptor)


def _empty(path: Path) -> None:
    """The signature goes last: if this is interrupted, what is left still tells whose it is."""
    for child in sorted(path.iterdir(), key=lambda child: child.name == SIGNATURE):
        if child.is_dir():
            shutil.rmtree(child)
        else:
            child.unlink()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """The file appears whole."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def write(target: Path) -> None:
        write_tensor_file(target, layout, tensors.__getitem__, metadata)

    replace_file(path, write)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
