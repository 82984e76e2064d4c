"""`omnispeech serve`, and `python model_worker.py`: settings, models, engine, HTTP."""

import argparse
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, get_args, get_origin

from omnispeech.config import AccessConfig, DecoderConfig, EngineConfig, ServerConfig, TalkConfig
from omnispeech.config_reader import CONFIGS, unknown_variables
from omnispeech.logs import log_to_stdout
from omnispeech.server.access.tls import check_tls
from omnispeech.service import build_worker, read_settings

logger = logging.getLogger(__name__)

TITLES = {
    EngineConfig: "engine",
    DecoderConfig: "speech decoder",
    ServerConfig: "server",
    TalkConfig: "live conversations",
    AccessConfig: "access",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=serve)
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as flat TOML")
    for config in CONFIGS:
        title = TITLES.get(config)
        add_settings(parser.add_argument_group(title) if title else parser, config)


def add_settings(group: argparse._ActionsContainer, config: type[Any]) -> None:
    """One flag per field; its value is checked when the dataclass is built."""
    for f in fields(config):
        default = "none" if f.default == "" else f.default
        options: dict[str, Any] = {"help": f"{f.metadata['help']} (default: {default})"}
        if get_origin(f.type) is Literal:
            options["choices"] = get_args(f.type)
        elif f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": f.type, "metavar": str(getattr(f.type, "__name__", "")).upper()}
        group.add_argument(f"--{f.name.replace('_', '-')}", default=None, **options)


def serve(args: argparse.Namespace) -> int:
    """Serves until stopped; the exit status is 1 if the models could not be loaded."""
    signal.signal(signal.SIGTERM, stop_at_once)
    settings = read_settings(vars(args), args.config)
    log_to_stdout(settings.server.log_format, settings.server.log_level)
    for name in unknown_variables():
        logger.warning("the environment variable %s is no setting: it has no effect", name)
    check_tls(settings.access)
    worker = build_worker(settings)

    from omnispeech.server.app import create_app
    from omnispeech.server.door import listen
    from omnispeech.server.http import HTTPServer

    with listen(settings.server) as door:
        server = replace(settings.server, port=door.getsockname()[1])  # 0 was: any free port
        app = create_app(worker, server, settings.talk, settings.access)
        http = HTTPServer(app, server, settings.talk, settings.access)
        on_hang_up(http.handle_exit)
        worker.start(on_failure=http.stop)
        try:
            http.run(sockets=[door])
        finally:
            ended = worker.close()
    status = 1 if worker.status().failure else 0
    return status if ended else end_now(status)


def stop_at_once(number: int, frame: object) -> None:
    """Before the server has its own: process 1 of a container has no default for a signal."""
    end_now(128 + number)


def on_hang_up(handler: Callable[[int, FrameType | None], None]) -> None:
    """Of the terminal: a stop like others, unless `nohup` had it ignored."""
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handler)


def end_now(status: int) -> NoReturn:
    """Past the interpreter's own end, which aborts while another thread is inside torch."""
    logging.shutdown()
    os._exit(status)
