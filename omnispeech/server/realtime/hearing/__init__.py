"""What the server hears of a client, and whose turn it is by that."""
