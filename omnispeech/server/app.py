"""The web application: what is served where."""

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

import omnispeech
from omnispeech.config import ServerConfig
from omnispeech.engine.events import EngineStatus, SpeechEngine
from omnispeech.errors import NotReady
from omnispeech.server.limits import BodyLimit
from omnispeech.server.live import live_routes
from omnispeech.server.refusal import add_error_handlers, error_body, retry_after
from omnispeech.server.speech import speech_routes
from omnispeech.server.stream_infer import stream_infer_routes
from omnispeech.server.worker_api import worker_routes


def create_app(engine: SpeechEngine, config: ServerConfig) -> FastAPI:
    # the pages that FastAPI would make load scripts from elsewhere
    app = FastAPI(title="omnispeech", version=omnispeech.__version__, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_mb=config.max_body_mb)
    add_error_handlers(app)
    app.include_router(worker_routes(engine, config))
    app.include_router(live_routes(engine))
    app.include_router(stream_infer_routes(engine))
    app.include_router(speech_routes(engine, config))

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process answers, whatever the models do."""
        return {"status": "healthy", "service": "model_worker"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> JSONResponse:
        return readiness(engine.status())

    return app


def readiness(status: EngineStatus) -> JSONResponse:
    figures: dict[str, Any] = {
        "running": status.running,
        "waiting": status.waiting,
        "max_running": status.max_running,
        "max_waiting": status.max_waiting,
        "phases": {name: asdict(phase) for name, phase in status.phases.items()},
    }
    if status.ready:
        return JSONResponse({"status": "ready", **figures})
    error = NotReady(status.failure or "the models are still being loaded; try again later")
    name = "failed" if status.failure else "loading"
    body = {"status": name, **error_body(error), **figures}
    return JSONResponse(body, error.status, retry_after(error))
