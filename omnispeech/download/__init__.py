"""Brings models from a hub into a models directory, whole and verified."""
