"""What uvicorn logs, without what fills a log and says nothing."""

import asyncio
import logging

PROBES = ("/health", "/ready", "/metrics")


def shorten_log() -> None:
    """From now on, in the whole process; a second call changes nothing."""
    logging.getLogger("uvicorn.access").addFilter(is_news)
    logging.getLogger("uvicorn.error").addFilter(tell_cut_requests_in_one_line)


def is_news(record: logging.LogRecord) -> bool:
    """Not a probe that was answered as probes are: ready, or not yet."""
    match record.args:
        case (_, "GET" | "HEAD", str(path), _, int(status)) if path.partition("?")[0] in PROBES:
            return not (200 <= status < 300 or status == 503)
    return True


def tell_cut_requests_in_one_line(record: logging.LogRecord) -> bool:
    """A server that ends cuts what is over its time: that is no defect with a traceback."""
    if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
        record.msg, record.args, record.exc_info = "a request was cut: the server ends", (), None
    return True
