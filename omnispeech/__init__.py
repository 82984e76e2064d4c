"""Speech-to-speech server for OpenS2S-family checkpoints."""

__version__ = "0.1.0"
