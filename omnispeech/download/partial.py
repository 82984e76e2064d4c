"""`NAME.partial` beside the directory to come: what an interrupted fetch has already brought.

files/       verified, under their own names; becomes the directory
incomplete/  on their way, under name and hash: a changed file never continues an older one
record.json  which files are verified, against which hash; nothing is hashed twice
"""

import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omnispeech.checkpoint.manifest import FileRecord, Manifest
from omnispeech.checkpoint.models_directory import is_there
from omnispeech.checkpoint.whole_file import replace_file, sync
from omnispeech.download.hub import HubFile, Listing
from omnispeech.download.present import partial_path
from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    hash: str  # of the hub
    record: FileRecord


class Partial:
    def __init__(self, models_directory: Path, name: str) -> None:
        self.target = models_directory / name
        self.path = partial_path(self.target)
        is_there(self.path)  # raises for what is none of ours
        self._files, self._record = self.path / "files", self.path / "record.json"
        self._lock = threading.Lock()
        self._kept, self._made = self._read()

    def records(self, files: Iterable[HubFile]) -> dict[str, FileRecord]:
        """Of those that are here and verified, by path."""
        return {file.path: self._kept[file.path].record for file in files if self._has(file)}

    def _has(self, file: HubFile) -> bool:
        kept = self._kept.get(file.path)
        found = kept is not None and kept.hash == file.hash
        return found and _unchanged(self._files / file.path, self._kept[file.path].record)

    def incomplete(self, file: HubFile) -> Path:
        """Where the content of `file` grows."""
        return self.path / "incomplete" / f"{file.path}.{file.hash[:16]}"

    def grown(self, file: HubFile) -> int:
        """Bytes of it that are here."""
        path = self.incomplete(file)
        return path.stat().st_size if path.exists() else 0

    def clear(self, files: Iterable[HubFile]) -> None:
        """Deletes what belongs to none of `files`: those that changed on the hub meanwhile."""
        wanted = list(files)
        here = {self._files / file.path for file in wanted if self._has(file)}
        coming = {self.incomplete(file) for file in wanted if not self._has(file)}
        for path in self.path.rglob("*"):
            if path.is_file() and path not in here | coming | {self._record}:
                logger.info("%s belongs to no file of this commit: deleted", path)
                path.unlink()

    def keep(self, file: HubFile, sha256: str) -> None:
        """What has grown is verified: it gets its name here."""
        grown, path = self.incomplete(file), self._files / file.path
        sync(grown)
        status = grown.stat()
        with self._lock:
            record = FileRecord(sha256, status.st_size, status.st_mtime_ns)
            self._kept[file.path] = Kept(file.hash, record)
            self._write()
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(grown, path)

    def publish(self, listing: Listing, others: Mapping[str, FileRecord]) -> None:
        """All files are verified: the directory gets its name and its entry in the manifest.

        others: records of files of `listing` that are in the directory already.
        """
        records = {**others, **self.records(listing.files)}
        if missing := [file.path for file in listing.files if file.path not in records]:
            raise CheckpointError(f"{missing[0]} of {listing.model.repo} is not verified")
        self._kept = {file.path: Kept(file.hash, records[file.path]) for file in listing.files}
        self._made = listing.made
        self.path.mkdir(exist_ok=True)
        self._write()
        if not self.finish():
            raise CheckpointError(f"{self.target} was changed by another program; start again")

    def finish(self) -> bool:
        """Whether all that was verified could be published; also after an interruption."""
        waiting = [p for p, kept in self._kept.items() if _unchanged(self._files / p, kept.record)]
        others = self._kept.keys() - waiting
        there = all(_unchanged(self.target / p, self._kept[p].record) for p in others)
        if self._made is None or not there:
            return False
        if _empty(self.target) and not _leads_elsewhere(self.target):
            for folder in (self._files, *self._files.rglob("*/")):
                sync(folder)
            os.replace(self._files, self.target)
        else:
            self._replace(waiting)
        sync(self.target.parent)
        records = {path: kept.record for path, kept in self._kept.items()}
        Manifest(self.target.parent).enter(self.target.name, self._made, records)
        self._remove()
        return True

    def tidy(self) -> None:
        """Takes away what a finished fetch has left, and nothing that another can still use."""
        if not any(self.path.iterdir()):
            self.path.rmdir()
        else:
            self.finish()

    def _replace(self, paths: Iterable[str]) -> None:
        for path in paths:
            place = self.target / path
            place.parent.mkdir(parents=True, exist_ok=True)
            _move(self._files / path, place)
            sync(place.parent)

    def _remove(self) -> None:
        """The record goes last: as long as it is there, what was interrupted is known."""
        for folder in (self._files, self.path / "incomplete"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.path)

    def _write(self) -> None:
        raw = {
            "made": self._made,
            "files": {path: asdict(kept) for path, kept in sorted(self._kept.items())},
        }
        text = json.dumps(raw, indent=1, ensure_ascii=False) + "\n"
        replace_file(self._record, lambda path: _write_text(path, text))

    def _read(self) -> tuple[dict[str, Kept], Mapping[str, Any] | None]:
        """What cannot be read is not known: then the files are fetched again."""
        try:
            raw = read_json(self._record)
            kept = {
                path: Kept(value["hash"], FileRecord(**value["record"]))
                for path, value in raw["files"].items()
            }
        except (CheckpointError, OSError, KeyError, TypeError, AttributeError):
            return {}, None
        return kept, raw.get("made")


def _unchanged(path: Path, record: FileRecord) -> bool:
    if not path.is_file():
        return False
    status = path.stat()
    return (status.st_size, status.st_mtime_ns) == (record.size, record.mtime_ns)


def _empty(directory: Path) -> bool:
    return not directory.exists() or not any(directory.iterdir())


def _leads_elsewhere(directory: Path) -> bool:
    """A link, or where a disk is mounted: no directory can take its place."""
    return directory.is_symlink() or os.path.ismount(directory)


def _move(source: Path, place: Path) -> None:
    """Also to another disk."""
    try:
        os.replace(source, place)
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
        replace_file(place, lambda path: _copy(source, path))
        source.unlink()


def _copy(source: Path, target: Path) -> None:
    """With its time, by which it is known."""
    shutil.copy2(source, target)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
