"""What a reply has cost, as OpenAI counts."""

from typing import Any

from omnispeech.engine.events import Done


def completion_usage(done: Done) -> dict[str, Any]:
    """Of chat completions. The tokens of speech are units."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.text_tokens + done.units,
        "total_tokens": done.prompt_tokens + done.text_tokens + done.units,
        "prompt_tokens_details": {
            "audio_tokens": done.audio_tokens,
            "text_tokens": done.prompt_tokens - done.audio_tokens,
            "cached_tokens": done.cached_tokens,
        },
        "completion_tokens_details": {
            "audio_tokens": done.units,
            "text_tokens": done.text_tokens,
            "reasoning_tokens": 0,
        },
    }


def token_usage(done: Done) -> dict[str, Any]:
    """Of speech and transcriptions."""
    output = done.text_tokens + done.units
    return {
        "type": "tokens",
        "input_tokens": done.prompt_tokens,
        "input_token_details": {
            "audio_tokens": done.audio_tokens,
            "text_tokens": done.prompt_tokens - done.audio_tokens,
        },
        "output_tokens": output,
        "total_tokens": done.prompt_tokens + output,
    }
