"""A conversation in the terminal over /v1/realtime: devices, sound files or a pipe."""
