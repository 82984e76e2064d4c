"""`omnispeech scale`: many replicas of the engine behind one address, with Ray Serve."""

import argparse
import logging
import os
import signal

from omnispeech.commands import serve
from omnispeech.config import ScaleConfig
from omnispeech.config_reader import build_config, read_config_file, unknown_variables
from omnispeech.logs import log_to_stdout
from omnispeech.service import settings_of

logger = logging.getLogger(__name__)

PROXY_START_S = "30"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    serve.add_arguments(parser)
    serve.add_settings(parser.add_argument_group("replicas"), ScaleConfig)
    parser.set_defaults(run=scale)


def scale(args: argparse.Namespace) -> int:
    """Serves until stopped; the exit status is 1 if no replica could start."""
    signal.signal(signal.SIGTERM, serve.stop_at_once)
    file = read_config_file(args.config) if args.config else {}
    settings = settings_of(vars(args), file)
    replicas = build_config(ScaleConfig, vars(args), file)
    log_to_stdout(settings.server.log_format, settings.server.log_level)
    for name in unknown_variables():
        logger.warning("the environment variable %s is no setting: it has no effect", name)

    prepare_environment(replicas.ray_address)
    from omnispeech.ray_deployment import serve_until_stopped

    return serve_until_stopped(settings, replicas)


def prepare_environment(ray_address: str) -> None:
    """What Ray reads when it is imported, and hands on to every process that it starts."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    # a busy machine takes longer than Ray's 5 s to start a proxy, which would end everything
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", PROXY_START_S)
    if ray_address == "local":
        # Ray's words for "on loopback alone", whatever the system
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
