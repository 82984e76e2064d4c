"""A small hub on loopback: what `huggingface_hub` asks when models are fetched, and mishaps."""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 1000  # bytes from which on a file is a large one, with a SHA-256
PIECE = 1 << 14


@dataclass
class Mishap:
    """Befalls requests whose path contains `part`, `times` times."""

    part: str
    status: int = 0  # answered instead
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int = -1  # bytes of the answer, then the connection is cut
    damage: bool = False  # one bit of the answer
    pause_s: float = 0.0  # before each piece
    ignore_range: bool = False
    times: int = 1_000_000


class Hub(ThreadingHTTPServer):
    """`files` of one commit per repository; the commit changes with the files."""

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, dict[str, bytes]], token: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories = dict(repositories)
        self.token = token
        self.elsewhere = ""  # URL of a server that has the files; the hub sends clients there
        self.mishaps: list[Mishap] = []
        self.requests: list[tuple[str, str]] = []  # path, Range
        self.tokens: set[str | None] = set()
        self.sent: Counter[str] = Counter()  # bytes, by file name
        self.gate = threading.Event()  # files wait for it
        self.gate.set()
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients of these tests go away in the middle."""

    def befalls(self, path: str) -> Mishap | None:
        with self.lock:
            for mishap in self.mishaps:
                if mishap.part in path and mishap.times > 0:
                    mishap.times -= 1
                    return mishap
        return None


def commit_of(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha1()
    for path, content in sorted(files.items()):
        digest.update(path.encode() + hashlib.sha1(content).digest())
    return digest.hexdigest()


def sibling(path: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    item: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": blob}
    if len(content) >= LARGE:
        sha256 = hashlib.sha256(content).hexdigest()
        item["blobId"] = hashlib.sha1(sha256.encode()).hexdigest()  # of the pointer
        item["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 130}
    return item


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.tokens.add(self.headers["Authorization"])
        self.server.requests.append((path, self.headers["Range"] or ""))
        mishap = self.server.befalls(path) or Mishap("")
        if mishap.status:
            self._answer(mishap.status, b"{}", mishap.headers)
        elif listing := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self._list(*listing.groups())
        elif self.server.elsewhere:
            self._answer(302, b"", {"Location": self.server.elsewhere + self.path})
        elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send(*file.groups(), mishap)
        else:
            self._answer(404, b"{}", {})

    def _repository(self, repo: str, revision: str) -> dict[str, bytes] | None:
        if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        files = self.server.repositories.get(repo)
        if files is None:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        if revision not in ("main", commit_of(files)):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return files

    def _list(self, repo: str, revision: str) -> None:
        files = self._repository(repo, revision)
        if files is not None:
            siblings = [sibling(path, content) for path, content in files.items()]
            body = {"id": repo, "sha": commit_of(files), "siblings": siblings}
            self._answer(200, json.dumps(body).encode(), {})

    def _send(self, repo: str, revision: str, path: str, mishap: Mishap) -> None:
        files = self._repository(repo, revision)
        if files is None:
            return
        if path not in files:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        self.server.gate.wait(30)
        content = files[path]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(asked[1]) if asked and not mishap.ignore_range else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit_of(files))
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self._stream(path, content[start:], mishap)

    def _stream(self, path: str, content: bytes, mishap: Mishap) -> None:
        if mishap.damage and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        if mishap.cut_after >= 0:
            content = content[: mishap.cut_after]
            self.close_connection = True
        for at in range(0, len(content), PIECE):
            time.sleep(mishap.pause_s)
            self.wfile.write(content[at : at + PIECE])
            self.server.sent[path] += len(content[at : at + PIECE])

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)
