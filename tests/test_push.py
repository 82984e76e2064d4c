"""Uploads with the real huggingface_hub, to a small hub of our own on loopback."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from omnispeech.errors import CheckpointError, ConfigError, Unavailable
from omnispeech.quantization.push import push_to_hub

TOKEN = "hf_of_a_writer"

# of huggingface_hub, which sends large files in a way that its HTTP client wants changed
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Hub(ThreadingHTTPServer):
    """Keeps what is pushed in memory; `refuse` maps a part of a path to the status it gets."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.created: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuse: dict[str, int] = {}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(404, {"error": "Repository not found"})

    def do_PUT(self) -> None:
        body = self._body()
        if status := self._refused():
            return self._answer(status, {"error": "no"})
        self.server.objects[self.path.removeprefix("/upload/")] = body
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        self.server.tokens.add(self.headers["Authorization"])
        if status := self._refused():
            self._answer(status, {"error": "no"})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path.endswith("/preupload/main"):
            self._answer(200, {"files": [upload_mode(file) for file in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif self.path.endswith("/commit/main"):
            self._commit(body)
        else:
            self._answer(404, {"error": self.path})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        status = 409 if any(made["id"] == name for made in self.server.created) else 200
        self.server.created.append(wanted | {"id": name})
        self._answer(status, {"url": f"{self.server.url}/{name}"})

    def _batch(self, asked: dict[str, Any]) -> None:
        assert asked["operation"] == "upload"
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.server.url}/upload/{item['oid']}"}}}
            for item in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, body: bytes) -> None:
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                content = self.server.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.server.files[value["path"]] = content
        oid = "0" * 40
        repo = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
        address = f"{self.server.url}/{repo}/commit/{oid}"
        self._answer(200, {"commitUrl": address, "commitOid": oid, "success": True})

    def _refused(self) -> int | None:
        return next((s for part, s in self.server.refuse.items() if part in self.path), None)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    # Xet is a second service beside the hub; a hub without it gets plain LFS
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    files = {
        "config.json": b"{}",
        "model-00001-of-00002.safetensors": b"\x00\x01" * 3000,
        "model-00002-of-00002.safetensors": b"\x02\x03" * 2000,
        "tts/tokenizer.json": b"[1]",
        ".model.safetensors.1.partial": b"left behind",
    }
    for name, content in files.items():
        path = tmp_path / "AWQ-4bit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "AWQ-4bit"


def test_every_file_arrives_as_it_is_on_disk(hub: Hub, model: Path) -> None:
    assert push_to_hub(model, "me/small-awq") == f"{hub.url}/me/small-awq"
    expected = {
        path.relative_to(model).as_posix(): path.read_bytes()
        for path in model.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    assert hub.files == expected
    assert len(hub.objects) == 2  # the weights went as large files, the rest in the commit
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_a_token_that_is_given_goes_before_the_one_of_the_environment(
    hub: Hub, model: Path
) -> None:
    push_to_hub(model, "me/small-awq", "hf_other")
    assert hub.tokens == {"Bearer hf_other"}


@pytest.mark.parametrize(("private", "visibility"), [(True, "private"), (None, None)])
def test_a_private_repository_is_made_private(
    hub: Hub, model: Path, private: bool | None, visibility: str | None
) -> None:
    push_to_hub(model, "me/small-awq", private=private)
    made = hub.created[0]
    said = made.get("visibility") or ("private" if made.get("private") else None)
    assert said == visibility


def test_a_second_push_goes_to_the_same_repository(hub: Hub, model: Path) -> None:
    push_to_hub(model, "me/small-awq")
    (model / "config.json").write_bytes(b'{"changed": true}')
    push_to_hub(model, "me/small-awq")
    assert hub.files["config.json"] == b'{"changed": true}'


@pytest.mark.parametrize("part", ["/api/repos/create", "/preupload/"])
@pytest.mark.parametrize(("status", "word"), [(401, "HF_TOKEN"), (403, "write access")])
def test_a_hub_that_refuses_is_quoted_with_what_to_do(
    hub: Hub, model: Path, part: str, status: int, word: str
) -> None:
    hub.refuse = {part: status}
    with pytest.raises(ConfigError, match=rf"\({status}\).*{word}"):
        push_to_hub(model, "me/small-awq")
    assert not hub.files


def test_a_large_file_that_is_refused_fails_the_push(hub: Hub, model: Path) -> None:
    hub.refuse = {"/upload/": 403}
    with pytest.raises(ConfigError, match="write access"):
        push_to_hub(model, "me/small-awq")
    assert not hub.files


def test_a_hub_that_is_not_there_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"http://127.0.0.1:9 could not be reached"):
        push_to_hub(model, "me/small-awq", "hf_x")


def test_a_name_that_is_none_is_refused_before_anything_is_sent(hub: Hub, model: Path) -> None:
    with pytest.raises(ConfigError, match="USER/NAME"):
        push_to_hub(model, "me/small/awq")
    assert not hub.created


def test_a_directory_without_a_model_is_not_sent(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        push_to_hub(tmp_path, "me/small-awq")
    assert not hub.created
