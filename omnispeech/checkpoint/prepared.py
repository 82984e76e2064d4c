"""Kernel-ready copies of quantized models, beside them in the models directory.

The first start on a machine repacks the weights for its kernels and keeps the result as
`OpenS2S-llm-awq.prepared-0123456789ab`; the next ones load that. It is a cache: whatever does not
fit, is damaged or went, is made again from the model, never used, and never an error.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omnispeech.checkpoint.files import size_text
from omnispeech.checkpoint.kernel_ready import KernelReady, kernel_ready_layout, write_kernel_ready
from omnispeech.checkpoint.manifest import Manifest, ManifestEntry
from omnispeech.checkpoint.models_directory import Sources, check
from omnispeech.checkpoint.prepared_key import Key
from omnispeech.checkpoint.prepared_key import Machine as Machine
from omnispeech.checkpoint.quantized import read_quantization
from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json
from omnispeech.layers.linear import QuantizedLinear
from omnispeech.layers.quantized_weight import Form

logger = logging.getLogger(__name__)

PREPARED = "*.prepared-*"  # names of such directories
FILE = "model.safetensors"
LOCK = ".prepared.lock"
ROOM = 1 << 28  # bytes that stay free on the disk
KEY_LENGTH = 12  # hexadecimal digits

State = Literal["current", "outdated", "absent"]


class _ReplacedError(Exception):
    pass


@dataclass(frozen=True, eq=False)
class Prepared:
    """The copy of one quantized directory for one machine, there or not."""

    models: Path
    key: Key

    @property
    def name(self) -> str:
        return f"{self.key.source}.prepared-{self.key.digest[:KEY_LENGTH]}"

    @property
    def path(self) -> Path:
        return self.models / self.name

    @property
    def state(self) -> State:
        """current: the next start loads it; outdated: it removes it and makes another."""
        if self._fault() is None:
            return "current"
        return "outdated" if os.path.lexists(self.path) or self._outdated() else "absent"

    def open(self, forms: Mapping[str, Form]) -> KernelReady | None:
        """None, and a line of log that says why, if there is none that can be used.

        forms: of the linears that it must hold.
        """
        if not self.path.exists():
            return None
        try:
            return self._open(forms)
        except (CheckpointError, OSError) as exc:
            logger.warning("%s is not used, and made again: %s", self.path, exc)
            return None

    def write(self, linears: Mapping[str, QuantizedLinear]) -> None:
        """Makes the copy from loaded layers; one that cannot be written costs a line of log."""
        try:
            with self._locked():
                self._check_origin()
                for name in self._outdated():
                    logger.info("removing %s: made of another model, or by another version", name)
                    self._remove(name)
                self._remove_leftovers()
                self._write(linears)
        except BlockingIOError:
            logger.info("%s is being written by another start", self.path)
        except _ReplacedError as exc:
            logger.warning("%s is not kept: %s", self.path, exc)
        except (CheckpointError, OSError) as exc:
            logger.warning(
                "%s cannot be written (%s): weights are repacked at every start; --no-prepare "
                "says that they shall be",
                self.path,
                exc,
            )

    def _open(self, forms: Mapping[str, Form]) -> KernelReady:
        manifest = Manifest(self.models)
        made = manifest.entry(self.name).made
        if made.get("prepared") != self.key.told:
            raise CheckpointError("its entry is of another copy")
        check(manifest, self.name)
        ready = KernelReady(self.path / FILE)
        if ready.header_digest != made.get("header"):
            raise CheckpointError("its header is not the one that was written")
        if ready.forms != forms:
            raise CheckpointError("it holds other linears than the model")
        return ready

    def _fault(self) -> str | None:
        """By names, sizes and times alone."""
        try:
            Manifest(self.models).check(self.name)
        except CheckpointError as exc:
            return str(exc)
        return None

    def _write(self, linears: Mapping[str, QuantizedLinear]) -> None:
        _clear(self.path)  # damaged: its room is for this one
        self._check_room(linears)
        partial = self.models / f"{self.name}.partial"
        partial.mkdir()
        try:
            write_kernel_ready(partial / FILE, linears)
            with (partial / FILE).open("rb") as file:
                os.fsync(file.fileno())
            header = KernelReady(partial / FILE).header_digest
            os.replace(partial, self.path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        made = {"by": "omnispeech serve", "prepared": self.key.told, "header": header}
        Manifest(self.models).enter(self.name, made)
        size = (self.path / FILE).stat().st_size
        logger.info("kept for the next start: %s (%s)", self.path, size_text(size))

    def _check_origin(self) -> None:
        """The weights were read for a while: another process may have replaced their model."""
        source, manifest = self.key.source, Manifest(self.models)
        try:
            check(manifest, source)
            same = _identity(manifest.entry(source)) == self.key.identity
        except CheckpointError as exc:
            raise _ReplacedError(str(exc)) from exc
        if not same:
            raise _ReplacedError(f"{source} was replaced while it was read")

    def _check_room(self, linears: Mapping[str, QuantizedLinear]) -> None:
        layout = kernel_ready_layout(linears).values()
        size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout)
        free = shutil.disk_usage(self.models).free
        if free < size + ROOM:
            raise CheckpointError(
                f"it takes {size_text(size)} and the disk has {size_text(free)} left"
            )

    def _outdated(self) -> list[str]:
        """Names of directories that this one takes the place of, and of entries without one."""
        return [
            name
            for name, entry in prepared_entries(self.models).items()
            if name != self.name and self.key.supersedes(entry.made["prepared"])
        ]

    def _remove_leftovers(self) -> None:
        """Of starts that were killed: nobody else writes while the lock is held."""
        entered = prepared_entries(self.models)
        for path in self.models.glob(PREPARED):
            if path.name not in entered:
                _clear(path)

    def _remove(self, name: str) -> None:
        _clear(self.models / name)
        Manifest(self.models).forget(name)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, of all processes; raises BlockingIOError if there is one."""
        with (self.models / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield


def _clear(path: Path) -> None:
    """Takes away what is there, be it no directory; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def prepared_of(source: Path, machine: Machine, without: Collection[str] = ()) -> Prepared | None:
    """None for a directory that is not entered in the manifest beside it.

    without: language models that come from elsewhere, by name in the model.
    """
    entry = _entries(source.parent).get(source.name)
    if entry is None:
        return None
    return Prepared(source.parent, machine.key(source, _identity(entry), without))


def find_prepared(sources: Sources, machine: Machine) -> dict[str, Prepared]:
    """The copies that a start from `sources` would look for, by names of their models.

    No weight is read. A `state` of absent or outdated means that the start repacks and writes.
    """
    replaced = {"llm_model": sources.llm, "tts_lm_model": sources.speech_lm}
    others = {name: path for name, path in replaced.items() if path}
    left = len(others) < len(replaced)  # a language model of the base
    copies = copies_of(sources.base, others, machine)
    return {path.name: copy for path, copy in copies.items() if left or path != sources.base}


def copies_of(base: Path, others: Mapping[str, Path], machine: Machine) -> dict[Path, Prepared]:
    """By directory: of the model in `base` and of those that take the place of its parts.

    others: by name in the model.
    """
    parts = {path: () for path in others.values()} | {base: tuple(others)}
    found = {
        path: prepared_of(path, machine, without)
        for path, without in parts.items()
        if read_quantization(read_json(path / "config.json"))
    }
    return {path: prepared for path, prepared in found.items() if prepared}


def prepared_entries(models: Path) -> dict[str, ManifestEntry]:
    """All copies that are entered, for this machine or others, by name."""
    return {n: entry for n, entry in _entries(models).items() if "prepared" in entry.made}


def check_origin(models: Path, name: str) -> None:
    """Raises CheckpointError for a copy of a model that is another now, or is gone."""
    entries = _entries(models)
    key = entries[name].made["prepared"]
    origin = entries.get(key["source"])
    if origin is None or _identity(origin) != key["identity"]:
        raise CheckpointError(
            f"{models / name} was made from a {key['source']} that is no longer here; the next "
            "start that repacks that model removes it"
        )


def _entries(models: Path) -> dict[str, ManifestEntry]:
    manifest = Manifest(models)
    return {name: manifest.entry(name) for name in manifest.names()}


def _identity(entry: ManifestEntry) -> str:
    """Of the bytes alone: a copy of the directory has the same."""
    hashes = sorted((file, record.sha256) for file, record in entry.compared.items())
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
