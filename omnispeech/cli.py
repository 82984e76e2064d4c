"""The command line: `omnispeech COMMAND`, and what `model_worker.py` starts.

Nothing heavy is imported before the arguments are known to be right.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from omnispeech import __version__
from omnispeech.config import (
    CONFIGS,
    DecoderConfig,
    EngineConfig,
    PlaceConfig,
    ServerConfig,
    build_config,
    read_config_file,
    unknown_variables,
)
from omnispeech.errors import OmniSpeechError

logger = logging.getLogger(__name__)

TITLES = {EngineConfig: "engine", DecoderConfig: "speech decoder", ServerConfig: "server"}


def main(arguments: Sequence[str] | None = None) -> int:
    """`omnispeech COMMAND ...`; the exit status."""
    parser = argparse.ArgumentParser(prog="omnispeech", description="Speech-to-speech server.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="serve a models directory over HTTP"))
    _add_say(commands.add_parser("say", help="ask a server one spoken question"))
    _add_chat(commands.add_parser("chat", help="talk with a server in the terminal"))
    _add_tiny(commands.add_parser("tiny", help="write small random checkpoints"))
    _add_parity(commands.add_parser("parity", help="compare with golden numbers of the originals"))
    _add_verify(commands.add_parser("verify", help="check quantized models against the manifest"))
    _add_forget(commands.add_parser("forget", help="take deleted models out of the manifest"))
    return _run(parser, arguments)


def worker(arguments: Sequence[str] | None = None) -> int:
    """`python model_worker.py ...`; the exit status."""
    parser = argparse.ArgumentParser(
        prog="model_worker.py", description="Serves a models directory over HTTP."
    )
    _add_serve(parser)
    return _run(parser, arguments)


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except (OmniSpeechError, OSError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _add_serve(parser: argparse.ArgumentParser) -> None:
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
    file = read_config_file(args.config) if args.config else {}
    for name in unknown_variables():
        logger.warning("the environment variable %s is no setting: it has no effect", name)
    build = partial(build_config, flags=vars(args), file=file)
    engine, decoder, server = build(EngineConfig), build(DecoderConfig), build(ServerConfig)
    place = build(PlaceConfig)
    directory = Path(place.models)

    from omnispeech.assembly import choose_device, choose_dtype, load_sources
    from omnispeech.checkpoint.models_directory import choose_sources
    from omnispeech.layers.linear import known_kernel

    sources = choose_sources(directory, place.llm, place.speech_lm)
    device = choose_device(place.device)
    dtype = choose_dtype(place.dtype, device)
    kernel = known_kernel(place.kernel)

    from omnispeech.server.http import HTTPServer, listen

    with listen(server) as door:
        from omnispeech.engine.worker import Worker
        from omnispeech.server.app import create_app

        load = partial(
            load_sources, sources, device, dtype, kernel=kernel, compatible=engine.compatible
        )
        worker = Worker(load, engine, decoder)
        http = HTTPServer(create_app(worker, server), server)
        worker.start(on_failure=http.stop)
        try:
            http.run(sockets=[door])
        finally:
            worker.close()
    return 1 if worker.status().failure else 0


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server",
        metavar="URL",
        help="default: OMNISPEECH_SERVER, or http://127.0.0.1:8000",
    )
    parser.add_argument("--temperature", type=float, help="of the text; 0: greedy")
    parser.add_argument(
        "--top-p", type=float, help="of the text: the likeliest words up to this share"
    )
    parser.add_argument("--speech-temperature", type=float, help="of the speech units")
    parser.add_argument("--max-new-tokens", type=int, help="text tokens at most")
    parser.add_argument("--seed", type=int, help="the same seed gives the same reply")


def _sampling(args: argparse.Namespace) -> Any:
    from omnispeech.client import Sampling

    return Sampling(**{f.name: getattr(args, f.name) for f in fields(Sampling)})


def _add_say(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_say)
    parser.add_argument("question", type=Path, help="a sound file: WAV, FLAC, OGG or MP3")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("reply.wav"),
        metavar="FILE",
        help="default: reply.wav",
    )
    _add_server(parser)


def _say(args: argparse.Namespace) -> int:
    from omnispeech.client import default_server, say

    server = args.server or default_server()
    return say(args.question, args.output, server, sampling=_sampling(args))


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_chat)
    parser.add_argument("files", type=Path, nargs="*", help="questions to ask in turn")
    _add_server(parser)


def _chat(args: argparse.Namespace) -> int:
    from omnispeech.client import chat, default_server

    return chat(args.server or default_server(), args.files, sampling=_sampling(args))


def _add_tiny(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_tiny)
    parser.add_argument("directory", type=Path, help="gets OpenS2S and glm-4-voice-decoder")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same weights")


def _tiny(args: argparse.Namespace) -> int:
    from omnispeech.tiny.directory import write_tiny

    write_tiny(args.directory, seed=args.seed)
    sys.stdout.write(f"wrote OpenS2S and glm-4-voice-decoder under {args.directory}\n")
    return 0


def _add_parity(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_parity)
    parser.add_argument("directory", type=Path, help="a golden directory of either kind")


def _parity(args: argparse.Namespace) -> int:
    from omnispeech.parity.golden import compare
    from omnispeech.parity.report import print_report

    return print_report(compare(args.directory))


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_verify)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="directories; default: all that are known"
    )
    _add_models(parser)
    parser.add_argument("--deep", action="store_true", help="compare every byte")


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", metavar="DIR", help="default: OMNISPEECH_MODELS, or /models")


def _verify(args: argparse.Namespace) -> int:
    from omnispeech.verification import verify

    status = 0
    for verdict in verify(_models(args), args.names, deep=args.deep):
        sys.stdout.write(f"{verdict.name}: {verdict.words}\n")
        status = status if verdict.whole else 1
    return status


def _models(args: argparse.Namespace) -> Path:
    return Path(build_config(PlaceConfig, {"models": args.models}, {}).models)


def _add_forget(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_forget)
    parser.add_argument("names", nargs="+", metavar="NAME", help="directories that are gone")
    _add_models(parser)


def _forget(args: argparse.Namespace) -> int:
    from omnispeech.checkpoint.manifest import Manifest

    for name in args.names:
        Manifest(_models(args)).forget(name.rstrip("/"))
        sys.stdout.write(f"{name}: forgotten\n")
    return 0
