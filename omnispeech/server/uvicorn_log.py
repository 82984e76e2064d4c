"""What uvicorn logs, without what fills a log and says nothing, and without what callers asked."""

import asyncio
import logging

from omnispeech.errors import Stopped

PROBES = ("/health", "/ready", "/metrics")


def shorten_log() -> None:
    """From now on, in the whole process; a second call changes nothing."""
    access, error = logging.getLogger("uvicorn.access"), logging.getLogger("uvicorn.error")
    for logger in (access, error):  # the latter tells of WebSockets
        logger.addFilter(hide_query)
    access.addFilter(is_news)
    error.addFilter(tell_cuts_in_one_line)


def hide_query(record: logging.LogRecord) -> bool:
    """A query may hold a prompt, or a key."""
    if isinstance(record.args, tuple):
        record.args = tuple(without_query(value) for value in record.args)
    return True


def without_query(value: object) -> object:
    return value.partition("?")[0] if isinstance(value, str) and value[:1] == "/" else value


def is_news(record: logging.LogRecord) -> bool:
    """Not a probe that was answered as probes are: ready, or not yet."""
    match record.args:
        case (_, "GET" | "HEAD", str(path), _, int(status)) if path in PROBES:
            return not (200 <= status < 300 or status == 503)
    return True


def tell_cuts_in_one_line(record: logging.LogRecord) -> bool:
    """A server that ends cuts what is over its time: that is no defect with a traceback."""
    exc = record.exc_info[1] if record.exc_info else None
    # Starlette raises an error of its own from one that comes after the first byte
    if isinstance(exc, asyncio.CancelledError) or isinstance(exc and exc.__cause__, Stopped):
        record.msg, record.args, record.exc_info = "a request was cut: the server ends", (), None
    elif str(record.msg).rstrip().endswith("asyncio.exceptions.CancelledError"):
        record.msg = "the application was cut: the server ends"  # Starlette sends the traceback
    return True
