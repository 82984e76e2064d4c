"""Bytes <-> samples <-> features."""
