"""Trains the small model that speaks. Nothing that serves imports this."""
