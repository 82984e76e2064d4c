"""The web application: what is served where."""

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, ProcessCollector

import omnispeech
from omnispeech.config import AccessConfig, ServerConfig, TalkConfig
from omnispeech.engine.events import EngineStatus, SpeechEngine
from omnispeech.errors import NotReady
from omnispeech.server.admission import STOPPING, Admission
from omnispeech.server.limits import BodyLimit
from omnispeech.server.live import live_routes
from omnispeech.server.metrics import EngineGauges, Replies, metrics_routes
from omnispeech.server.refusal import add_error_handlers, error_body, retry_after
from omnispeech.server.speech import speech_routes
from omnispeech.server.stream_infer import stream_infer_routes
from omnispeech.server.worker_api import worker_routes

DEFAULT_TALK, DEFAULT_ACCESS = TalkConfig(), AccessConfig()
LOADING = "the models are still being loaded; try again later"


def create_app(
    engine: SpeechEngine,
    config: ServerConfig,
    talk: TalkConfig = DEFAULT_TALK,
    access: AccessConfig = DEFAULT_ACCESS,
) -> FastAPI:
    """`app.state.admission` lets whoever runs the app stop it without cutting a reply."""
    # the pages that FastAPI would make load scripts from elsewhere
    app = FastAPI(title="omnispeech", version=omnispeech.__version__, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_mb=config.max_body_mb)
    add_error_handlers(app)
    registry = CollectorRegistry()
    admission = Admission(engine, Replies(registry).ended)
    registry.register(EngineGauges(admission))
    ProcessCollector(registry=registry)  # memory, processor time, open files
    app.state.admission = admission
    app.include_router(worker_routes(admission, config))
    app.include_router(live_routes(admission))
    app.include_router(stream_infer_routes(admission))
    app.include_router(speech_routes(admission, config))
    app.include_router(metrics_routes(registry))

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process answers, whatever the models do."""
        return {"status": "healthy", "service": "model_worker"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> JSONResponse:
        return readiness(admission)

    return app


def readiness(admission: Admission) -> JSONResponse:
    status = admission.status()
    figures: dict[str, Any] = {
        "running": status.running,
        "waiting": status.waiting,
        "max_running": status.max_running,
        "max_waiting": status.max_waiting,
        "phases": {name: asdict(phase) for name, phase in status.phases.items()},
    }
    if admission.ready:
        return JSONResponse({"status": "ready", **figures})
    name, reason = hindrance(status, admission.stopping)
    error = NotReady(reason)
    body = {"status": name, **error_body(error), **figures}
    return JSONResponse(body, error.status, retry_after(error))


def hindrance(status: EngineStatus, stopping: bool) -> tuple[str, str]:
    """Why nothing is taken: a word for it, and a sentence."""
    if status.failure:
        return "failed", status.failure
    return ("stopping", STOPPING) if stopping else ("loading", LOADING)
