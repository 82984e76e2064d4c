"""`omnispeech serve`, and `python model_worker.py`: settings, models, engine, HTTP."""

import argparse
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from omnispeech.config import (
    CONFIGS,
    DecoderConfig,
    EngineConfig,
    ServerConfig,
    unknown_variables,
)
from omnispeech.service import build_worker, read_settings

logger = logging.getLogger(__name__)

TITLES = {EngineConfig: "engine", DecoderConfig: "speech decoder", ServerConfig: "server"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=serve)
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as flat TOML")
    for config in CONFIGS:
        title = TITLES.get(config)
        _add_settings(parser.add_argument_group(title) if title else parser, config)


def _add_settings(group: argparse._ActionsContainer, config: type[Any]) -> None:
    """One flag per field; its value is checked when the dataclass is built."""
    for f in fields(config):
        options: dict[str, Any] = {"help": f"{f.metadata['help']} (default: {f.default})"}
        if get_origin(f.type) is Literal:
            options["choices"] = get_args(f.type)
        elif f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": f.type, "metavar": str(getattr(f.type, "__name__", "")).upper()}
        group.add_argument(f"--{f.name.replace('_', '-')}", default=None, **options)


def serve(args: argparse.Namespace) -> int:
    """Serves until stopped; the exit status is 1 if the models could not be loaded."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for name in unknown_variables():
        logger.warning("the environment variable %s is no setting: it has no effect", name)
    settings = read_settings(vars(args), args.config)
    worker = build_worker(settings)

    from omnispeech.server.app import create_app
    from omnispeech.server.http import HTTPServer, listen

    with listen(settings.server) as door:
        http = HTTPServer(create_app(worker, settings.server), settings.server)
        worker.start(on_failure=http.stop)
        try:
            http.run(sockets=[door])
        finally:
            worker.close()
    return 1 if worker.status().failure else 0
