"""Which web pages may ask: cross-site requests, cross-site WebSockets, borrowed names."""

from pathlib import Path
from typing import Any

import pytest
import websockets
from access_keys import ALICE, app_behind, ask, bearer, key_file
from fake_engine import FakeEngine, serving, sound_file, tone
from starlette.datastructures import Headers
from websockets.asyncio.client import connect

from omnispeech.config import AccessConfig, ServerConfig
from omnispeech.errors import ConfigError, Forbidden
from omnispeech.server.access.origins import Origins
from omnispeech.server.app import create_app

WAV = sound_file(tone(0.2))
HERE = "http://127.0.0.1:8000"
PAGE = "https://talk.example.org"


def is_let_in(origin: str | None, host: str, listed: str = "", *, keys: bool = True) -> bool:
    given = {"host": host} | ({} if origin is None else {"origin": origin})
    try:
        Origins(AccessConfig(origins=listed).listed_origins, with_keys=keys).check(Headers(given))
    except Forbidden:
        return False
    return True


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (None, "127.0.0.1:8000"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://localhost:9000", "localhost:9000"),
        ("http://talk.localhost", "talk.localhost"),
        ("http://[::1]:8000", "[::1]:8000"),
        ("http://10.1.2.3:8000", "10.1.2.3:8000"),
        ("https://talk.example.org", "talk.example.org"),
        ("https://talk.example.org", "talk.example.org:443"),
        ("http://10.1.2.3", "10.1.2.3:80"),
        ("https://talk.example.org:8443", "TALK.example.org:8443"),
    ],
)
def test_pages_of_this_server_and_programs_may_ask(origin: str | None, host: str) -> None:
    assert is_let_in(origin, host, keys=False)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://evil.example", "127.0.0.1:8000"),
        ("http://127.0.0.1:3000", "127.0.0.1:8000"),  # another program's page
        ("http://127.0.0.1", "127.0.0.1:8000"),
        ("http://localhost:8000", "127.0.0.1:8000"),
        ("https://10.0.0.1", "10.0.0.1:80"),
        ("http://127.0.0.1:8000.evil.example", "127.0.0.1:8000"),
        ("http://127.0.0.1:8000@evil.example", "127.0.0.1:8000"),
        ("null", "127.0.0.1:8000"),
        ("null", ""),
        ("", ""),
        ("http://", ""),
        ("http://[::1", "[::1"),
        ("file://", "127.0.0.1:8000"),
    ],
)
def test_pages_of_others_may_not(origin: str, host: str) -> None:
    assert not is_let_in(origin, host)


def test_a_name_that_anybody_may_let_lead_here_is_no_proof_without_keys() -> None:
    """DNS rebinding: the page of evil.example, whose name now means 127.0.0.1."""
    borrowed = ("http://evil.example:8000", "evil.example:8000")
    assert not is_let_in(*borrowed, keys=False)
    assert is_let_in(*borrowed, keys=True)  # it has no key
    assert is_let_in(*borrowed, listed="http://evil.example:8000", keys=False)
    assert not is_let_in("http://localhost.evil.example", "localhost.evil.example", keys=False)


@pytest.mark.parametrize(
    ("listed", "origin", "let_in"),
    [
        (PAGE, PAGE, True),
        (f"http://a.example, {PAGE}", PAGE, True),
        (PAGE, "https://talk.example.org.evil.example", False),
        (PAGE, "http://talk.example.org", False),
        ("*", "https://evil.example", True),
        ("null", "null", True),
    ],
)
def test_listed_pages_may_ask(listed: str, origin: str, let_in: bool) -> None:
    assert is_let_in(origin, "127.0.0.1:8000", listed, keys=False) == let_in


@pytest.mark.parametrize(
    "origins", ["talk.example.org", f"{PAGE}/", f"{PAGE}/page", "https://TALK.example.org", "a b"]
)
def test_what_no_browser_would_send_is_refused_at_the_start(origins: str) -> None:
    with pytest.raises(ConfigError, match="is none; allowed: such as https://talk.example.org"):
        AccessConfig(origins=origins)


async def test_a_page_of_others_is_told_no_before_anything_is_done() -> None:
    engine = FakeEngine()
    app = create_app(engine, ServerConfig())
    answer = await ask(app, "/v1/speech", "POST", {"Origin": "https://evil.example"}, content=WAV)
    assert answer.status_code == 403 and engine.requests == []
    error = answer.json()["error"]
    assert error["type"] == "Forbidden" and "setting origins" in error["message"]
    assert "access-control-allow-origin" not in answer.headers


async def test_a_page_of_others_may_not_even_with_a_key_it_was_given(tmp_path: Path) -> None:
    app = app_behind(key_file(tmp_path, alice=ALICE))
    headers = bearer(ALICE) | {"Origin": "https://evil.example"}
    assert (await ask(app, "/v1/speech", "POST", headers, content=WAV)).status_code == 403


async def test_a_listed_page_may_read_the_answer_and_the_headers_it_needs(tmp_path: Path) -> None:
    app = app_behind(key_file(tmp_path, alice=ALICE), origins=PAGE)
    asked = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    before = await ask(app, "/v1/speech", "OPTIONS", asked)
    assert before.status_code == 200
    assert before.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in before.headers["access-control-allow-headers"]
    for key, status in ((ALICE, 200), ("x", 401)):
        answer = await ask(app, "/v1/speech", "POST", bearer(key) | {"Origin": PAGE}, content=WAV)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "X-Turn-Id" in answer.headers["access-control-expose-headers"]
        assert "Retry-After" in answer.headers["access-control-expose-headers"]


async def test_an_unlisted_page_learns_nothing_from_asking_first(tmp_path: Path) -> None:
    app = app_behind(key_file(tmp_path, alice=ALICE), origins=PAGE)
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    before = await ask(app, "/v1/speech", "OPTIONS", asked)
    assert before.status_code == 400
    assert "access-control-allow-origin" not in before.headers


async def test_probes_answer_whatever_page_asks() -> None:
    app = create_app(FakeEngine(), ServerConfig())
    assert (
        await ask(app, "/health", headers={"Origin": "https://evil.example"})
    ).status_code == 200


async def hello(url: str, origin: str | None, **options: Any) -> int | None:
    """The close code, or None: the talk goes on."""
    async with connect(
        url.replace("http", "ws", 1) + "/ws/stream?events=1", origin=origin, **options
    ) as socket:
        try:
            await socket.send("{}")
            await socket.recv()
        except websockets.ConnectionClosed as exc:
            return exc.rcvd.code if exc.rcvd else 0
        return None


async def test_a_websocket_of_a_page_of_others_is_closed_with_1008() -> None:
    engine = FakeEngine()
    with serving(engine) as url:
        assert await hello(url, "https://evil.example") == 1008
        assert await hello(url, "null") == 1008
        assert await hello(url, url) is None
        assert await hello(url, None) is None
    assert engine.requests == []


async def test_a_websocket_of_a_listed_page_is_let_in() -> None:
    with serving(FakeEngine(), access=AccessConfig(origins=PAGE)) as url:
        assert await hello(url, PAGE) is None
        assert await hello(url, "https://evil.example") == 1008
