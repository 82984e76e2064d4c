"""https and wss, with a certificate that is made here."""

import json
import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
from access_keys import make_certificate, whole_server
from websockets.asyncio.client import connect

from omnispeech.cli import main
from omnispeech.config import AccessConfig
from omnispeech.errors import ConfigError
from omnispeech.server.access.tls import check_tls

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tls")
    for name in ("here", "other"):
        make_certificate(place / f"{name}.pem", place / f"{name}.key")
    return place


def access(certificate: Path, key: Path) -> AccessConfig:
    return AccessConfig(tls_certificate=str(certificate), tls_key=str(key))


async def test_https_and_wss_are_spoken_and_http_is_not(place: Path) -> None:
    trust = ssl.create_default_context(cafile=place / "here.pem")
    with whole_server(access(place / "here.pem", place / "here.key")) as port:
        async with httpx.AsyncClient(verify=trust) as client:
            answer = await client.get(f"https://localhost:{port}/health")
            assert answer.json()["status"] == "healthy"
            with pytest.raises(httpx.TransportError):
                await client.get(f"http://localhost:{port}/health")
        address = f"wss://localhost:{port}/ws/stream?events=1"
        origin = f"https://localhost:{port}"
        async with connect(address, ssl=trust, origin=origin) as socket:
            await socket.send("{}")
            assert json.loads(await socket.recv())["type"] == "error"


async def test_a_certificate_that_is_not_trusted_is_not_taken(place: Path) -> None:
    with whole_server(access(place / "here.pem", place / "here.key")) as port:
        trust = ssl.create_default_context(cafile=place / "other.pem")
        async with httpx.AsyncClient(verify=trust) as client:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await client.get(f"https://localhost:{port}/health")


def test_files_that_are_good_are_taken(place: Path) -> None:
    check_tls(access(place / "here.pem", place / "here.key"))
    check_tls(AccessConfig())


@pytest.mark.parametrize(
    ("certificate", "key", "words"),
    [
        ("none.pem", "here.key", "tls_certificate='.*none.pem' cannot be read: No such file"),
        ("here.pem", "none.key", "tls_key='.*none.key' cannot be read: No such file"),
        ("here.pem", "other.key", "do not go together"),
        ("here.key", "here.pem", "do not go together"),
        ("here.pem", "here.pem", "as PEM and without a password"),
        ("here.pem", "locked.key", "without a password"),
    ],
)
def test_wrong_files_are_named(certificate: str, key: str, words: str, place: Path) -> None:
    command = ["openssl", "pkey", "-aes256", "-passout", "pass:secret"]
    command += ["-in", str(place / "here.key"), "-out", str(place / "locked.key")]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ConfigError, match=words):
        check_tls(access(place / certificate, place / key))


def test_one_without_the_other_is_refused() -> None:
    with pytest.raises(ConfigError, match="go together; give both or none"):
        AccessConfig(tls_certificate="a.pem")


@pytest.mark.usefixtures("no_settings")
def test_wrong_files_are_told_before_models_are_looked_for(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--tls-certificate", str(place / "none.pem"), "--tls-key", str(place / "here.key")]
    assert main(["serve", "--models", str(place / "no-models"), *files]) == 1
    assert "none.pem' cannot be read" in capsys.readouterr().err
