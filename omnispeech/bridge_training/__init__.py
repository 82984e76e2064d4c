"""Fits the layers between WavLM and a checkpoint made for another audio encoder, without labels."""
