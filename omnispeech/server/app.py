"""The web application: what is served where."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, ProcessCollector

import omnispeech
from omnispeech.config import AccessConfig, ServerConfig, TalkConfig
from omnispeech.engine.events import EngineStatus, SpeechEngine
from omnispeech.errors import NotReady
from omnispeech.server.access.guard import guard
from omnispeech.server.admission import STOPPING, Admission
from omnispeech.server.limits import BodyLimit
from omnispeech.server.live import live_routes
from omnispeech.server.metrics import EngineGauges, metrics_routes
from omnispeech.server.openai.audio_speech import audio_speech_routes
from omnispeech.server.openai.chat_completions import chat_routes
from omnispeech.server.openai.models import models_routes
from omnispeech.server.openai.transcriptions import transcription_routes
from omnispeech.server.page import page_routes
from omnispeech.server.realtime.route import realtime_routes
from omnispeech.server.realtime.talks import Talks
from omnispeech.server.refusal import add_error_handlers, error_body, retry_after
from omnispeech.server.speech import speech_routes
from omnispeech.server.stream_infer import stream_infer_routes
from omnispeech.server.tracing import tracing_of
from omnispeech.server.watch import Watch, Watched
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
    registry = CollectorRegistry()
    watch = Watch(registry, tracing_of(os.environ, config.model_name))
    admission = Admission(engine, watch.reply_ended, watch.talks.guessed)
    registry.register(EngineGauges(admission))
    ProcessCollector(registry=registry)  # memory, processor time, open files
    app = bare_app(config, access, watch)
    app.state.admission, app.state.watch = admission, watch
    app.include_router(worker_routes(admission, config))
    app.include_router(live_routes(admission))
    app.include_router(stream_infer_routes(admission))
    app.include_router(speech_routes(admission, config))
    app.include_router(chat_routes(admission, config, talk))
    app.include_router(audio_speech_routes(admission, config))
    app.include_router(transcription_routes(admission, config, talk))
    app.include_router(models_routes(config))
    talks = Talks(admission, config, talk, watch.talks)
    app.include_router(realtime_routes(talks, watch.tracing))
    app.include_router(metrics_routes(registry))
    if talk.page:
        app.include_router(page_routes())

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


def bare_app(config: ServerConfig, access: AccessConfig, watch: Watch) -> FastAPI:
    """What stands around every route."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(watch.tracing.close)

    app = FastAPI(
        title="omnispeech",
        version=omnispeech.__version__,
        lifespan=life,
        # the pages that FastAPI would make load scripts from elsewhere
        docs_url=None,
        redoc_url=None,
        # its own would send what callers said, in the messages of exceptions
        telemetry={
            "auto_configure": False,
            "tracing": False,
            "operation_spans": False,
            "metrics": False,
            "logs": False,
        },
    )
    app.add_middleware(BodyLimit, max_mb=config.max_body_mb, upload_s=access.upload_s)
    guard(app, access, config.host)
    app.add_middleware(Watched, watch=watch)  # the last one added is around all others
    add_error_handlers(app)
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
