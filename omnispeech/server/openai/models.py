"""GET /v1/models: the one model that is served."""

import time
from typing import Any

from fastapi import APIRouter

from omnispeech.config import ServerConfig
from omnispeech.server.openai.refusals import OpenAIRoute, Refused
from omnispeech.server.refusal import shown


def models_routes(config: ServerConfig) -> APIRouter:
    router = APIRouter(route_class=OpenAIRoute)
    model = {
        "id": config.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "omnispeech",
    }

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @router.get("/v1/models/{name:path}")
    async def named(name: str) -> dict[str, Any]:
        check_model(name, config)
        return model

    return router


def check_model(name: str | None, config: ServerConfig) -> None:
    """None: whichever is served."""
    if name not in (None, config.model_name):
        raise Refused(
            f"model={shown(name)} is not served here; the model is {config.model_name!r}",
            param="model",
            code="model_not_found",
            status=404,
        )
