"""How large what goes over the socket may be."""

MAX_FRAME_BYTES = 1_000_000  # to a client, which reads no more than 1 MiB at a time
MAX_FIELD_BYTES = 400_000  # of one setting: a session, in which it is told, fits into a frame
