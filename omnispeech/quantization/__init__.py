"""The offline half: one layer-streaming pipeline, methods plugged in."""
