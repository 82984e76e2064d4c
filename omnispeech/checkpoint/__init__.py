"""Files on disk <-> models in memory."""
