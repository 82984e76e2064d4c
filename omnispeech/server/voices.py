"""The model has one voice; the names of OpenAI's voices stand for it, so that clients work."""

from omnispeech.server.refusal import shown

VOICE = "default"
ALIASES = (
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable"),
    *("marin", "nova", "onyx", "sage", "shimmer", "verse"),
)


def voice_problem(voice: object) -> str | None:
    """voice: a name, or {"id": name} -> what is wrong with it, None if it can be spoken with."""
    name = voice.get("id") if isinstance(voice, dict) else voice
    if name in (VOICE, *ALIASES):
        return None
    also = ", ".join(ALIASES)
    return f"voice={shown(name)}; this model has one voice, {VOICE!r} (also called {also})"
