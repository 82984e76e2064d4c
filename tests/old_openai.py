"""python old_openai.py URL: what OpenAI's SDK on the path gets from a server of ours, as JSON."""

import base64
import json
import sys
from typing import Any

import openai

MESSAGES: Any = [{"role": "user", "content": "hello"}]
AUDIO: Any = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}


def heard(client: openai.OpenAI) -> dict[str, Any]:
    create = client.chat.completions.create
    spoken = create(model="omnispeech", messages=MESSAGES, **AUDIO).choices[0].message
    again = create(model="omnispeech", messages=[*MESSAGES, spoken, *MESSAGES])
    stream = create(model="omnispeech", messages=MESSAGES, **AUDIO, stream=True)
    # this SDK has no type for it: a plain dict
    parts: list[Any] = [
        c.choices[0].delta.audio for c in stream if hasattr(c.choices[0].delta, "audio")
    ]
    speech = client.audio.speech.create(
        model="omnispeech", voice="alloy", input="Hello", response_format="pcm"
    )
    return {
        "version": openai.__version__,
        "models": [model.id for model in client.models.list()],
        "transcript": spoken.audio and spoken.audio.transcript,
        "text": again.choices[0].message.content,
        "streamed": "".join(part.get("transcript", "") for part in parts),
        "bytes": len(base64.b64decode("".join(part.get("data", "") for part in parts))),
        "speech": len(speech.read()),
        "refusal": refusal(client),
    }


def refusal(client: openai.OpenAI) -> list[str | None]:
    try:
        client.chat.completions.create(model="omnispeech", messages=MESSAGES, n=2)
    except openai.BadRequestError as exc:
        return [exc.code, exc.param]
    return []


if __name__ == "__main__":
    with openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0) as client:
        sys.stdout.write(json.dumps(heard(client)))
