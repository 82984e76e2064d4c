import json
from http.client import HTTPConnection

import httpx
import pytest
from fake_engine import FakeEngine, call, serving, sound_file, tone

from omnispeech.engine.events import EngineStatus
from omnispeech.errors import GenerationError, NotReady, Overloaded, RequestError
from omnispeech.phases import Phase

LOADING = EngineStatus(ready=False, max_running=8, max_waiting=16, phases={"read": Phase(1.5, 10)})
BROKEN = EngineStatus(ready=False, failure="OpenS2S/config.json does not exist")
WAV = sound_file(tone(0.2))


@pytest.mark.parametrize("status", [LOADING, BROKEN, EngineStatus(ready=True)])
async def test_health_answers_whatever_the_models_do(status: EngineStatus) -> None:
    response = await call(FakeEngine(status=status), "GET", "/health")
    assert response.status_code == 200
    assert response.json() == {"status": "healthy", "service": "model_worker"}


async def test_ready_tells_the_queue() -> None:
    status = EngineStatus(ready=True, running=3, waiting=2, max_running=8, max_waiting=16)
    response = await call(FakeEngine(status=status), "GET", "/ready")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ready",
        "running": 3,
        "waiting": 2,
        "max_running": 8,
        "max_waiting": 16,
        "phases": {},
    }


@pytest.mark.parametrize(
    ("status", "name", "reason"),
    [
        (LOADING, "loading", "the models are still being loaded; try again later"),
        (BROKEN, "failed", "OpenS2S/config.json does not exist"),
    ],
)
async def test_not_ready_is_503_with_the_reason(
    status: EngineStatus, name: str, reason: str
) -> None:
    response = await call(FakeEngine(status=status), "GET", "/ready")
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    body = response.json()
    assert body["status"] == name
    assert body["error"] == {"type": "NotReady", "message": reason}
    assert body["max_running"] == status.max_running


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (RequestError("no"), 400, None),
        (Overloaded("full"), 503, "1"),
        (NotReady("loading"), 503, "5"),
        (GenerationError("device"), 500, None),
    ],
)
async def test_a_refusal_of_the_engine_is_a_status_with_a_json_body(
    error: Exception, status: int, retry_after: str | None
) -> None:
    response = await call(FakeEngine(error), "POST", "/v1/speech", content=WAV)
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    assert response.json() == {"error": {"type": type(error).__name__, "message": str(error)}}


async def test_a_defect_of_the_server_is_500_without_its_inside() -> None:
    response = await call(FakeEngine(KeyError("secret")), "POST", "/v1/speech", content=WAV)
    assert response.status_code == 500
    message = "the server failed; its log has the reason"
    assert response.json() == {"error": {"type": "ServerError", "message": message}}


@pytest.mark.parametrize(
    ("method", "path", "status", "name"),
    [
        ("GET", "/nothing", 404, "NotFound"),
        ("GET", "/worker_generate_stream", 405, "MethodNotAllowed"),
        ("GET", "/v1/speech/unknown", 404, "NotFound"),
    ],
)
async def test_wrong_paths_and_methods_are_told_in_json(
    method: str, path: str, status: int, name: str
) -> None:
    response = await call(FakeEngine(), method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == name
    assert path in response.json()["error"]["message"]


async def test_a_phrase_of_http_is_told_in_small_letters() -> None:
    response = await call(FakeEngine(), "GET", "/nothing")
    assert response.json()["error"]["message"] == "GET /nothing: not found"


@pytest.mark.parametrize(
    ("status", "path", "code"),
    [
        (LOADING, "/health", 200),
        (LOADING, "/ready", 503),
        (EngineStatus(ready=True), "/ready", 200),
    ],
)
def test_head_answers_like_get_without_the_body(status: EngineStatus, path: str, code: int) -> None:
    with serving(FakeEngine(status=status)) as url:
        head, get = httpx.head(url + path), httpx.get(url + path)
    assert (head.status_code, head.content) == (code, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_no_page_that_loads_scripts_from_elsewhere_is_served(path: str) -> None:
    assert (await call(FakeEngine(), "GET", path)).status_code == 404


@pytest.mark.parametrize("path", ["/worker_generate_stream", "/stream_infer", "/v1/speech"])
def test_a_body_over_the_limit_is_413(path: str) -> None:
    with serving(FakeEngine(), max_body_mb=1) as url:
        response = httpx.post(url + path, content=bytes(1_000_001))
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "TooLarge"
    assert "1 MB" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/worker_generate_stream", "/stream_infer", "/v1/speech"])
def test_a_body_over_the_limit_without_a_declared_length_is_413(path: str) -> None:
    frame = (1000).to_bytes(4, "little") + bytes(1000)
    with serving(FakeEngine(), max_body_mb=1) as url:
        response = httpx.post(url + path, content=(frame for _ in range(1001)))
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "TooLarge"


def test_a_declared_length_over_the_limit_is_refused_before_the_body_is_sent() -> None:
    with serving(FakeEngine(), max_body_mb=1) as url:
        connection = HTTPConnection(url.removeprefix("http://"), timeout=3)
        connection.putrequest("POST", "/v1/speech")
        connection.putheader("Content-Length", "1000001")
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()


async def test_b14_a_tiny_upload_is_answered() -> None:
    engine = FakeEngine()
    response = await call(engine, "POST", "/v1/speech", content=sound_file(tone(0.1)))
    assert response.status_code == 200
    assert len(engine.heard[0].content[0].samples) == 1600


async def test_the_schema_is_served() -> None:
    response = await call(FakeEngine(), "GET", "/openapi.json")
    assert "/v1/speech" in json.loads(response.content)["paths"]
