"""OpenAI's protocols over HTTP: chat completions, speech, transcriptions, models."""
