"""What is said in a sound, written down by the LLM that hears it. Nobody has measured how well."""

from contextlib import aclosing

from omnispeech.engine.events import (
    Audio,
    Done,
    Message,
    Samples,
    SpeechEngine,
    Text,
    TextDelta,
    TurnRequest,
)
from omnispeech.errors import RequestError

INSTRUCTION = (
    "Write down word for word what is said in the recording, in the language that is spoken. "
    "Do not answer it, do not translate it, and write nothing else."
)
MOST_TOKENS = 1024


def transcription_turn(samples: Samples) -> TurnRequest:
    """Text alone, greedily."""
    messages = (
        Message("system", (Text(INSTRUCTION),)),
        Message("user", (Audio(samples),)),
    )
    return TurnRequest(messages=messages, speech=False, max_new_tokens=MOST_TOKENS, temperature=0.0)


async def transcribe(engine: SpeechEngine, samples: Samples) -> str:
    """Raises RequestError if the transcript is too long to be whole."""
    text = ""
    async with aclosing(engine.answer(transcription_turn(samples))) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                text += event.text
            elif isinstance(event, Done):
                check_whole(event)
    return text.strip()


def check_whole(done: Done) -> None:
    if done.text_finish == "length":
        raise RequestError(
            f"the transcript does not end within {done.text_tokens} tokens; send a shorter sound"
        )
