"""`omnispeech-manifest.json`: which directories of a models directory are whole, and their files.

A directory is entered when it is complete. Later it counts only while it is as it was entered:
files that came in addition do no harm, one that changed or went does. Reports for people to read
are entered as well, but nothing that runs reads them: they may change or go.
"""

import fcntl
import hashlib
import json
import logging
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from omnispeech.checkpoint.whole_file import replace_file
from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json

logger = logging.getLogger(__name__)

FILE_NAME = "omnispeech-manifest.json"
FORMAT = 1
PIECE = 1 << 24  # bytes hashed at a time
REPORTS = ("*.log", "quantization_report.json", "bridge_report.json")

Entries = dict[str, "ManifestEntry"]


@dataclass(frozen=True, slots=True)
class FileRecord:
    sha256: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    made: Mapping[str, Any]  # what made it: command, settings, source
    entered: str  # date and time in UTC, ISO 8601
    files: Mapping[str, FileRecord]  # by path inside the directory, with forward slashes

    @property
    def compared(self) -> dict[str, FileRecord]:
        """Those that a model needs: all but reports."""
        return {
            file: record
            for file, record in self.files.items()
            if not any(fnmatch(file, pattern) for pattern in REPORTS)
        }


class Touched(CheckpointError):
    """Sizes are as entered, a time is not: the bytes may be the same."""


class Manifest:
    def __init__(self, models_directory: Path) -> None:
        """The file itself need not be there yet; it is read at every call."""
        self._directory = models_directory
        self.path = models_directory / FILE_NAME

    def names(self) -> list[str]:
        """Sorted names of the directories that were entered."""
        return sorted(self._read())

    def entry(self, name: str) -> ManifestEntry:
        entries = self._read()
        if name not in entries:
            raise CheckpointError(
                f"{self._directory / name} is not in {self.path}: it was not finished, or came "
                f"from elsewhere; make it again, or enter it with: {self._verify} {name}"
            )
        return entries[name]

    def enter(
        self, name: str, made: Mapping[str, Any], records: Mapping[str, FileRecord] | None = None
    ) -> ManifestEntry:
        """Hashes every file of the directory `name` and records it, in place of an older entry.

        made: how it was made, any JSON object.
        records: by path inside the directory, of files that were hashed already; nothing is then
            hashed here, and files that are not among them do not belong to the model.
        """
        directory = self._directory / name
        if Path(name).name != name or name in ("", "..") or not directory.is_dir():
            raise CheckpointError(f"{name!r} is not a directory in {self._directory}")
        files = _records(directory) if records is None else dict(records)
        if not files:
            raise CheckpointError(f"{directory} holds no files; there is nothing to enter")
        entry = ManifestEntry(dict(made), _now(), files)
        try:
            self._put(name, entry)
        except OSError as exc:
            raise self._unwritable(exc) from exc
        return entry

    def forget(self, name: str) -> None:
        """Takes out the entry of a directory that is gone; raises CheckpointError for any other."""
        self.entry(name)
        if os.path.lexists(self._directory / name):
            raise CheckpointError(f"{self._directory / name} is still there; delete it first")
        try:
            self._change(lambda entries: entries.pop(name, None))
        except OSError as exc:
            raise self._unwritable(exc) from exc

    def check(self, name: str, deep: bool = False) -> None:
        """Raises CheckpointError, with the file, if the directory is not as it was entered.

        By names, sizes and times of change (Touched); `deep` hashes every file instead, and
        accepts equal bytes that were copied or restored at another time. Reports are not looked at.
        """
        entry = self._sized(name)
        if deep:
            self._compare(name, entry, entry.compared)
        elif touched := self._touched(name, entry):
            reason = "it was written to, or copied, since"
            raise Touched(self._unlike(self._directory / name / touched[0], reason))

    def check_touched(self, name: str) -> None:
        """As `check` with `deep`, but only files with another time are hashed."""
        entry = self._sized(name)
        self._compare(name, entry, self._touched(name, entry))

    def _sized(self, name: str) -> ManifestEntry:
        """Of a directory whose files are there, with their sizes."""
        entry = self.entry(name)
        for file, record in entry.compared.items():
            self._check_size(self._directory / name / file, record)
        return entry

    def _compare(self, name: str, entry: ManifestEntry, files: Iterable[str]) -> None:
        directory = self._directory / name
        found = {file: record_file(directory / file) for file in files}
        for file, record in found.items():
            if record.sha256 != entry.files[file].sha256:
                raise self._changed(directory / file, "its bytes have changed")
        if (files_now := {**entry.files, **found}) != entry.files:
            self._renew(name, ManifestEntry(entry.made, entry.entered, files_now))

    def _check_size(self, path: Path, record: FileRecord) -> None:
        if not path.is_file():
            raise self._changed(path, "it is missing")
        if (size := path.stat().st_size) != record.size:
            raise self._changed(path, f"it has {size} bytes instead of {record.size}")

    def _touched(self, name: str, entry: ManifestEntry) -> list[str]:
        """Files that have another time than when they were entered."""
        return [
            file
            for file, record in entry.compared.items()
            if (self._directory / name / file).stat().st_mtime_ns != record.mtime_ns
        ]

    def _changed(self, path: Path, reason: str) -> CheckpointError:
        """What to do depends on what made the directory: whoever asks adds it."""
        return CheckpointError(self._unlike(path, reason))

    def _unlike(self, path: Path, reason: str) -> str:
        return f"{path} is not as it was entered in {self.path.name}: {reason}"

    def _renew(self, name: str, entry: ManifestEntry) -> None:
        """Models are often mounted read-only: then every start compares all bytes."""
        try:
            self._put(name, entry)
        except OSError as exc:
            logger.warning("%s cannot be written (%s); %s is whole", self.path, exc, name)

    def _unwritable(self, exc: OSError) -> CheckpointError:
        return CheckpointError(f"{self.path} cannot be written: {exc.strerror}")

    def _put(self, name: str, entry: ManifestEntry) -> None:
        self._change(lambda entries: entries.update({name: entry}))

    def _change(self, change: Callable[[Entries], object]) -> None:
        with self._locked():
            entries = self._read()
            change(entries)
            raw = {"format": FORMAT, "entries": {n: asdict(entries[n]) for n in sorted(entries)}}
            text = json.dumps(raw, indent=1, ensure_ascii=False) + "\n"
            for left in self._directory.glob(f".{FILE_NAME}.*.partial"):
                left.unlink()  # of a writer that was killed: the lock is held here
            replace_file(self.path, lambda path: _write(path, text))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, of all processes; it ends with the process, however that ends."""
        with (self._directory / f".{FILE_NAME}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def _verify(self) -> str:
        return f"omnispeech verify --models {shlex.quote(str(self._directory))}"

    @property
    def _anew(self) -> str:
        return f"move the file away, then enter what is whole anew with: {self._verify}"

    def _read(self) -> Entries:
        if not self.path.exists():
            return {}
        try:
            raw = read_json(self.path)
        except OSError as exc:
            raise CheckpointError(f"{self.path} cannot be read: {exc.strerror}") from exc
        except CheckpointError as exc:
            raise CheckpointError(f"{exc}; {self._anew}") from exc
        if raw.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.path} has format {raw.get('format')!r}; known: {FORMAT}; "
                f"use the version of omnispeech that wrote it, or {self._anew}"
            )
        try:
            return {name: _entry(value) for name, value in raw["entries"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise CheckpointError(f"{self.path} is damaged: {exc!r}; {self._anew}") from exc


def _entry(raw: Mapping[str, Any]) -> ManifestEntry:
    files = {file: FileRecord(**record) for file, record in raw["files"].items()}
    if not isinstance(raw["made"], dict):
        raise TypeError(f"made is {raw['made']!r}")
    return ManifestEntry(raw["made"], raw["entered"], files)


def _records(directory: Path) -> dict[str, FileRecord]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): record_file(path) for path in paths}


def record_file(path: Path) -> FileRecord:
    """Reads and hashes every byte."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        status = os.fstat(file.fileno())  # of before: what is written meanwhile will be noticed
        while piece := file.read(PIECE):
            digest.update(piece)
    return FileRecord(digest.hexdigest(), status.st_size, status.st_mtime_ns)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
