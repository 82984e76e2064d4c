"""All of OpenAI's HTTP routes."""

from fastapi import APIRouter

from omnispeech.config import ServerConfig, TalkConfig
from omnispeech.engine.events import SpeechEngine
from omnispeech.server.openai.audio_speech import speech_routes
from omnispeech.server.openai.chat_completions import chat_routes
from omnispeech.server.openai.models import models_routes
from omnispeech.server.openai.transcriptions import transcription_routes


def openai_routes(engine: SpeechEngine, config: ServerConfig, talk: TalkConfig) -> APIRouter:
    router = APIRouter()
    router.include_router(chat_routes(engine, config, talk))
    router.include_router(speech_routes(engine, config))
    router.include_router(transcription_routes(engine, config, talk))
    router.include_router(models_routes(config))
    return router
