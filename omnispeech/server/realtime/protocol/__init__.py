"""What goes over the socket: events of clients, refusals, ids, sizes."""
