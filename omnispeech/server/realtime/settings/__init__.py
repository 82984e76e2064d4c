"""What a client may set, of a session and of one response."""
