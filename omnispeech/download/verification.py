"""Content against the hub's own hash: SHA-256 of large files, git's SHA-1 of the others."""

import hashlib
from pathlib import Path

from omnispeech.checkpoint.manifest import FileRecord
from omnispeech.download.hub import HubFile

PIECE = 1 << 22  # bytes hashed at a time


class Digest:
    """SHA-256 for the manifest and the hub's hash, of content that comes in pieces."""

    def __init__(self, file: HubFile) -> None:
        self._sha256 = hashlib.sha256()
        self._git = None if file.sha256 else _git_blob(file.size)

    def update(self, piece: bytes) -> None:
        self._sha256.update(piece)
        if self._git:
            self._git.update(piece)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def hash(self) -> str:
        """To be compared with `HubFile.hash`."""
        return (self._git or self._sha256).hexdigest()


def matches(path: Path, record: FileRecord, file: HubFile) -> bool:
    """Whether a file on disk is that of the hub. record: its size and SHA-256 of just now."""
    if record.size != file.size:
        return False
    if file.sha256:
        return record.sha256 == file.sha256
    digest = Digest(file)
    digest.update(path.read_bytes())  # not a large file: no SHA-256 of the hub
    return digest.hash == file.hash


def _git_blob(size: int) -> "hashlib._Hash":
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
