"""Where a server writes its log."""

import io
import logging
import sys


def log_to_stdout() -> None:
    """To where `docker logs NAME | grep WORD` looks: what goes to stderr passes grep by.

    A sign that the stream cannot show becomes "?".
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout
    )
    for library in ("httpx", "httpx2"):  # they tell of every request
        logging.getLogger(library).setLevel(logging.WARNING)
