"""What the tests of the door share: keys, and a server behind them without a network."""

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from fake_engine import FakeEngine
from fastapi import FastAPI

from omnispeech.config import AccessConfig, ServerConfig
from omnispeech.server.app import create_app
from omnispeech.server.door import listen
from omnispeech.server.http import HTTPServer

ALICE, BOB = "alice-0123456789-abcdef", "bob-0123456789-abcdef"


def key_file(place: Path, *lines: str, **keys: str) -> Path:
    """lines: of the last key, or of the file where there is no key."""
    path = place / "api-keys.toml"
    tables = [f'[keys.{name}]\nkey = "{key}"' for name, key in keys.items()]
    path.write_text("\n".join([*tables, *lines]) + "\n", encoding="utf-8")
    path.chmod(0o600)
    return path


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def app_behind(path: Path | str, engine: FakeEngine | None = None, **access: Any) -> FastAPI:
    return create_app(
        engine or FakeEngine(), ServerConfig(), access=AccessConfig(api_keys=str(path), **access)
    )


async def ask(
    app: FastAPI, path: str, method: str = "GET", headers: dict[str, str] | None = None, **kw: Any
) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        return await client.request(method, path, headers=headers, **kw)


@contextmanager
def whole_server(access: AccessConfig, engine: FakeEngine | None = None) -> Iterator[int]:
    """As `omnispeech serve` builds it, its log included; gives the port."""
    config = ServerConfig(port=0)
    app = create_app(engine or FakeEngine(), config, access=access)
    server = HTTPServer(app, config, access=access)
    with listen(config) as door:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.005)
        try:
            yield door.getsockname()[1]
        finally:
            server.stop()
            thread.join(10)
            assert not thread.is_alive()


def make_certificate(certificate: Path, key: Path) -> None:
    """Of localhost, good for two days."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
