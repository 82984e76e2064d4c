"""What a start would do on this machine, and whether a snapshot of it would do the same."""
