"""Who may come in: keys of a file and of the environment, by header and by subprotocol."""

import hashlib
import hmac
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import websockets
from access_keys import ALICE, BOB, app_behind, ask, bearer, key_file, whole_server
from fake_engine import FakeEngine, serving, sound_file, tone
from websockets.asyncio.client import connect

from omnispeech.cli import main
from omnispeech.config import AccessConfig, ServerConfig
from omnispeech.errors import ConfigError, TooManyRequests, Unauthorized
from omnispeech.server.access import keys as keys_module
from omnispeech.server.access.callers import CALLER
from omnispeech.server.access.keys import LOOK_S, Keys
from omnispeech.server.app import create_app
from omnispeech.server.refusal_by_path import close_reason

WAV = sound_file(tone(0.2))


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def no_key_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(keys_module.VARIABLE, raising=False)


def name_of(keys: Keys, key: str) -> str | None:
    account = keys.find(key)
    return account.name if account else None


async def test_without_keys_everything_is_open() -> None:
    response = await ask(
        create_app(FakeEngine(), ServerConfig()), "/v1/speech", "POST", content=WAV
    )
    assert response.status_code == 200


async def test_a_key_of_the_file_lets_in_and_no_other_does(tmp_path: Path) -> None:
    app = app_behind(key_file(tmp_path, alice=ALICE, bob=BOB))
    for headers, status in (
        (bearer(ALICE), 200),
        (bearer(BOB), 200),
        (bearer(ALICE[:-1]), 401),
        (bearer(f"{ALICE}x"), 401),
        ({"Authorization": f"Basic {ALICE}"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({}, 401),
    ):
        response = await ask(app, "/v1/speech", "POST", headers, content=WAV)
        assert response.status_code == status, headers


async def test_who_asked_is_forgotten_with_the_request(tmp_path: Path) -> None:
    await ask(app_behind(key_file(tmp_path, alice=ALICE)), "/v1/models", headers=bearer(ALICE))
    assert CALLER.get().name == "anybody"


def test_a_reason_fits_into_a_close_frame() -> None:
    assert len(close_reason(Unauthorized("ä" * 100)).encode()) == 122


async def test_who_is_refused_is_told_what_to_do(tmp_path: Path) -> None:
    app = app_behind(key_file(tmp_path, alice=ALICE))
    without = await ask(app, "/v1/speech", "POST", content=WAV)
    assert without.headers["www-authenticate"] == "Bearer"
    assert without.json()["error"]["type"] == "Unauthorized"
    assert "Authorization: Bearer KEY" in without.json()["error"]["message"]
    wrong = await ask(app, "/v1/speech", "POST", bearer(BOB), content=WAV)
    assert "not known" in wrong.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/", "/page/talk.js", "/worker_get_status"])
async def test_probes_and_the_page_need_no_key(path: str, tmp_path: Path) -> None:
    app = app_behind(key_file(tmp_path, alice=ALICE))
    method = "POST" if path == "/worker_get_status" else "GET"
    assert (await ask(app, path, method)).status_code != 401


@pytest.mark.parametrize(
    "path", ["/metrics", "/pages", "/health/", "/health/x", "/v1/none", "/openapi.json"]
)
async def test_everything_else_does(path: str, tmp_path: Path) -> None:
    app = app_behind(key_file(tmp_path, alice=ALICE))
    assert (await ask(app, path)).status_code == 401
    assert (await ask(app, path, headers=bearer(ALICE))).status_code in (200, 307, 404)


async def test_figures_may_be_left_open(tmp_path: Path) -> None:
    path = key_file(tmp_path, alice=ALICE)
    path.write_text(f"open_metrics = true\n{path.read_text()}")
    app = app_behind(path)
    assert (await ask(app, "/metrics")).status_code == 200
    assert (await ask(app, "/v1/speech/x")).status_code == 401


def test_a_key_may_stand_as_its_digest(tmp_path: Path) -> None:
    digest = hashlib.sha256(ALICE.encode()).hexdigest()
    keys = Keys(key_file(tmp_path, "[keys.alice]", f'sha256 = "{digest.upper()}"'))
    assert name_of(keys, ALICE) == "alice" and keys.find(digest) is None


def test_keys_of_the_environment_have_no_limits() -> None:
    keys = Keys(None, f" {ALICE}, {BOB}")
    assert name_of(keys, ALICE) == "OMNISPEECH_API_KEY 1"
    assert name_of(keys, BOB) == "OMNISPEECH_API_KEY 2"
    assert name_of(Keys(None, BOB), BOB) == "OMNISPEECH_API_KEY"
    assert not Keys(None, "").needed and not Keys(None, " ,").needed


async def test_the_environment_alone_closes_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys_module.VARIABLE, ALICE)
    app = create_app(FakeEngine(), ServerConfig())
    assert (await ask(app, "/v1/speech/x")).status_code == 401
    assert (await ask(app, "/v1/speech/x", headers=bearer(ALICE))).status_code == 404


def test_every_key_is_compared_in_constant_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(len(one))
        return one == other

    keys = Keys(key_file(tmp_path, alice=ALICE, bob=BOB))
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in (ALICE, BOB, "x", ""):
        keys.find(key)
    assert compared == [32] * 8  # digests: their length says nothing of the key's


# ---- the file changes


def test_a_changed_file_counts_within_a_second(tmp_path: Path) -> None:
    clock = Clock()
    path = key_file(tmp_path, alice=ALICE)
    keys = Keys(path, clock=clock)
    alice = keys.find(ALICE)
    key_file(tmp_path, bob=BOB)
    assert name_of(keys, ALICE) == "alice"  # not looked at yet
    clock.now_s += LOOK_S
    assert keys.find(ALICE) is None and name_of(keys, BOB) == "bob"
    assert alice is not None and alice.revoked


def test_a_key_that_stays_keeps_its_account(tmp_path: Path) -> None:
    clock = Clock()
    keys = Keys(key_file(tmp_path, alice=ALICE), clock=clock)
    alice = keys.find(ALICE)
    key_file(tmp_path, "conversations = 1", bob=BOB, alice=ALICE)
    clock.now_s += LOOK_S
    assert keys.find(ALICE) is alice and alice is not None and not alice.revoked
    alice.take_conversation()
    with pytest.raises(TooManyRequests):  # the new limit
        alice.take_conversation()


def test_the_last_key_taken_away_does_not_open_the_door(tmp_path: Path) -> None:
    clock = Clock()
    keys = Keys(key_file(tmp_path, alice=ALICE), clock=clock)
    key_file(tmp_path, "[keys]")
    clock.now_s += LOOK_S
    assert keys.find(ALICE) is None and keys.needed and not keys.metrics_are_open


@pytest.mark.parametrize(
    "broken", ["keys = [", '[keys.bob]\nkey = "short"', "", "open_metrics = true", None]
)
def test_a_file_that_breaks_leaves_the_keys_as_they_were(
    broken: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    path = key_file(tmp_path, alice=ALICE)
    keys = Keys(path, clock=clock)
    path.unlink() if broken is None else path.write_text(broken)
    clock.now_s += LOOK_S
    assert name_of(keys, ALICE) == "alice"
    [error] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert str(path) in error.getMessage() and "short" not in caplog.text
    key_file(tmp_path, bob=BOB)
    clock.now_s += LOOK_S
    assert name_of(keys, BOB) == "bob"


def test_a_file_beside_keys_of_the_environment_needs_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    path = key_file(tmp_path, "open_metrics = true")
    keys = Keys(path, ALICE, clock)
    assert keys.metrics_are_open
    path.write_text("open_metrics = false")
    clock.now_s += LOOK_S
    assert not keys.metrics_are_open and not caplog.records


def test_a_file_that_others_may_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = key_file(tmp_path, alice=ALICE)
    Keys(path)
    assert "chmod" not in caplog.text
    path.chmod(0o644)
    Keys(path)
    assert f"chmod 600 {path}" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no key in it; add one: omnispeech key NAME"),
        ("keys = 1", r"a table of its own, \[keys.NAME\]"),
        ('[key.alice]\nkey = "x"', "unknown name 'key'; known: keys, open_metrics"),
        ('open_metrics = "yes"', "open_metrics is not true or false"),
        ("[keys.alice]\nconversations = 1", "keys.alice needs one of key and sha256"),
        ('[keys.alice]\nkey = "a"\nsha256 = "b"', "needs one of key and sha256"),
        ('[keys.alice]\nsha256 = "abc"', "64 hexadecimal digits"),
        ("[keys.alice]\nkey = 5", "a key is a text"),
        ('[keys.alice]\nkey = "123456"', "keys.alice: a key has at least 16 characters"),
        (f'[keys.alice]\nkey = "{ALICE} "', "keys.alice: a key has at least 16 characters"),
        (f'[keys.alice]\nkey = "{ALICE}"\nrequests = 3', "unknown name 'requests'"),
        (
            f'[keys.alice]\nkey = "{ALICE}"\nconversations = 0',
            "keys.alice.conversations=0; allowed",
        ),
        (f'[keys.alice]\nkey = "{ALICE}"\nconversations = 1.5', "conversations=1.5; allowed"),
        (
            f'[keys.a]\nkey = "{ALICE}"\n[keys.b]\nkey = "{ALICE}"',
            "keys.b is the same key as keys.a",
        ),
        (f'[keys.alice]\nkey = "{ALICE}', r"is not valid TOML in UTF-8"),
        ("[keys.alice]\nkey = \n", r"is not valid TOML in UTF-8 \(at line 2\)"),
    ],
)
def test_a_wrong_file_is_refused_at_the_start_and_no_key_is_told(
    text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=words) as raised:
        Keys(path)
    assert str(path) in str(raised.value)
    assert ALICE not in str(raised.value) and "123456" not in str(raised.value)
    assert raised.value.__cause__ is None  # it would be in a traceback


def test_a_file_that_is_not_there_is_refused_with_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; make it: omnispeech key NAME >>"):
        app_behind(tmp_path / "none.toml")


def test_a_short_key_of_the_environment_is_refused() -> None:
    with pytest.raises(ConfigError, match="OMNISPEECH_API_KEY: a key has at least 16") as raised:
        Keys(None, "hunter2")
    assert "hunter2" not in str(raised.value)


# ---- omnispeech key


def test_the_lines_of_a_new_key_let_it_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["key", "alice"]) == 0
    said = capsys.readouterr()
    path = tmp_path / "keys.toml"
    path.write_text(said.out)
    [key] = [word for word in said.err.split() if word.startswith("os-")]
    assert name_of(Keys(path), key) == "alice"
    assert key not in said.out  # what is kept is its digest


def test_two_new_keys_are_different(capsys: pytest.CaptureFixture[str]) -> None:
    main(["key", "a"])
    main(["key", "a"])
    first, second = [line for line in capsys.readouterr().out.splitlines() if "sha256" in line]
    assert first != second


def test_a_name_that_toml_would_not_take_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", 'a"b]']) == 1
    assert "letters, digits, - and _" in capsys.readouterr().err


# ---- WebSockets


async def closed_with(url: str, **options: Any) -> tuple[int | None, str, str | None]:
    """Close code and reason of a connection, and the subprotocol that was chosen."""
    async with connect(url.replace("http", "ws", 1) + "/ws/stream", **options) as socket:
        with pytest.raises(websockets.ConnectionClosed) as raised:
            await socket.recv()
        assert raised.value.rcvd is not None
        return raised.value.rcvd.code, raised.value.rcvd.reason, socket.subprotocol


async def test_a_talk_without_a_key_is_accepted_and_closed_with_the_reason(tmp_path: Path) -> None:
    access = AccessConfig(api_keys=str(key_file(tmp_path, alice=ALICE)))
    with serving(FakeEngine(), access=access) as url:
        code, reason, chosen = await closed_with(url)
        assert (code, chosen) == (1008, None) and "an API key is needed" in reason
        code, reason, chosen = await closed_with(url, subprotocols=["realtime"])
        assert (code, chosen) == (1008, "realtime")
        code, reason, _ = await closed_with(url, additional_headers=bearer(BOB))
        assert code == 1008 and "not known" in reason


@pytest.mark.parametrize("way", ["header", "subprotocol"])
async def test_a_talk_brings_its_key_as_programs_do_and_as_pages_do(
    way: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"additional_headers": bearer(ALICE)}
    if way == "subprotocol":
        protocols = ["other", f"openai-insecure-api-key.{ALICE}"]
        options = {"subprotocols": protocols}
    access = AccessConfig(api_keys=str(key_file(tmp_path, alice=ALICE)))
    with serving(FakeEngine(), access=access) as url:
        address = url.replace("http", "ws", 1) + "/ws/stream?events=1"
        async with connect(address, **options) as socket:
            await socket.send("{}")
            assert "error" in await socket.recv()  # it was understood: it is in
            assert socket.subprotocol is None  # the key is not sent back


async def test_the_key_stands_in_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("websockets.client").setLevel(logging.WARNING)  # the test's own side
    access = AccessConfig(api_keys=str(key_file(tmp_path, alice=ALICE)))
    protocols = ["realtime", f"openai-insecure-api-key.{BOB}"]
    with whole_server(access) as port:
        url = f"http://127.0.0.1:{port}"
        await closed_with(url, subprotocols=protocols)
        await closed_with(url, additional_headers=bearer(BOB))
        async with connect(
            url.replace("http", "ws", 1) + "/ws/stream",
            additional_headers=bearer(ALICE),
        ):
            pass
    app = app_behind(access.api_keys)
    for key in (ALICE, BOB):
        told = await ask(app, "/v1/speech", "POST", bearer(key), content=b"no sound")
        assert key not in told.text
    assert "/ws/stream" in caplog.text and ALICE not in caplog.text and BOB not in caplog.text


@pytest.mark.parametrize(
    ("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True), ("::1", False)]
)
def test_an_open_door_to_other_machines_is_warned_of(
    host: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    create_app(FakeEngine(), ServerConfig(host=host))
    assert ("no API key is needed" in caplog.text) == warned


def test_with_keys_nobody_is_warned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    access = AccessConfig(api_keys=str(key_file(tmp_path, alice=ALICE)))
    create_app(FakeEngine(), ServerConfig(host="0.0.0.0"), access=access)
    assert caplog.text == "" and os.environ.get(keys_module.VARIABLE) is None


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/audio/speech", "/v1/models"])
async def test_where_clients_of_openai_ask_they_are_refused_in_their_own_shape(
    path: str, tmp_path: Path
) -> None:
    answer = await ask(app_behind(key_file(tmp_path, alice=ALICE)), path, "POST", bearer(BOB))
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"] == {
        "message": "the API key is not known here; ask who runs the server for one",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
