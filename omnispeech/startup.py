"""What `startup.py` does: the models are brought and checked, then the process is the worker.

A start that finds everything asks no hub, hashes nothing and imports no torch before the worker.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import (
    DECODER,
    EIGHT_BIT,
    OPENS2S,
    check,
    check_place,
    is_there,
)
from omnispeech.checkpoint.wavlm_paths import WAVLM, is_wavlm, wavlm_paths
from omnispeech.commands import serve
from omnispeech.config import HubConfig, PlaceConfig, StartConfig
from omnispeech.config_reader import read_hub, read_start
from omnispeech.download.models import known_model, mend_command
from omnispeech.download.present import STOPPED, settle
from omnispeech.logs import log_to_stdout
from omnispeech.server.door import listen
from omnispeech.service import Settings, choose_target, read_settings
from omnispeech.small.directory import is_small, lacking, tell_small, write_small

logger = logging.getLogger(__name__)

PICKLES = ("flow.pt", "hift.pt")
REPLACEABLE = ("auto", "awq", "gptq", "8bit")  # --llm with which the 8-bit model is enough


def add_arguments(parser: argparse.ArgumentParser, given: Sequence[str], place: Path) -> None:
    """Those of the worker, and those of a start. place: the directory of model_worker.py."""
    serve.add_arguments(parser)
    _add_own(parser)
    parser.set_defaults(run=partial(start, given=given, place=place))


def _add_own(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("start")
    own.add_argument("--once", action="store_true", help="answer one spoken question, then end")
    serve.add_settings(own, StartConfig)
    serve.add_settings(parser.add_argument_group("hub"), HubConfig)


def start(args: argparse.Namespace, *, given: Sequence[str], place: Path) -> int:
    """Becomes the worker, with the flags of `given` that are its own; gives the status of --once.

    What can be known to be wrong is raised before anything is fetched.
    """
    settings = read_settings(vars(args), args.config)
    log_to_stdout(settings.server.log_format, settings.server.log_level)
    hub, own = read_hub(vars(args), args.config), read_start(vars(args), args.config)
    models = Path(settings.place.models)
    check_place(models)
    if not args.once:
        check_port(settings)
    signal.signal(signal.SIGTERM, _stop)  # process 1 of a container has no default for it
    prepare(settings, models, hub, small=own.small)
    command = [sys.executable, str(place / "model_worker.py"), *worker_flags(given)]
    if args.once:
        from omnispeech.once import answer_once

        return answer_once(command, place / "examples/question.wav")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


def _stop(number: int, frame: object) -> None:
    """At once: what was fetched is kept, whenever a start ends."""
    logger.info(STOPPED)
    serve.stop_at_once(number, frame)


def check_port(settings: Settings) -> None:
    listen(settings.server).close()


def worker_flags(given: Sequence[str]) -> list[str]:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    _add_own(parser)
    return parser.parse_known_args(list(given))[1]


def prepare(settings: Settings, models: Path, hub: HubConfig, *, small: bool = False) -> None:
    """All models of a start are whole and entered, and the decoder is converted.

    small: where none is, it is the small one, and no hub is asked.
    """
    first = names_of(models, settings.place)
    if OPENS2S not in first:
        logger.info("%s is not fetched: %s holds the whole model", OPENS2S, models / EIGHT_BIT)
    else:
        bring_small(models, hub, wanted=small)
    bring(first, models, settings.place, hub)
    names = names_of(models, settings.place)  # what came may hear by a WavLM
    bring([name for name in names if name not in first], models, settings.place, hub)
    if is_small(models / OPENS2S):
        tell_small(models, hub)
    convert_decoder(models / DECODER)
    count = len(names) + (OPENS2S not in names)
    logger.info("✅ All %d models are ready!", count)


def bring_small(models: Path, hub: HubConfig, *, wanted: bool) -> None:
    """Writes the small model where it is `wanted` and no other is."""
    if names := lacking(models, hub, wanted=wanted):
        logger.info("putting the small model into %s: %s", models, ", ".join(names))
        write_small(models)
    elif wanted and not is_small(models / OPENS2S):
        logger.info("--small changes nothing: %s holds another model", models)


def names_of(models: Path, place: PlaceConfig) -> list[str]:
    """Of the directories of a start that come from a hub, as far as can be known now."""
    base = choose_base(models, place)
    names = [DECODER] if base == EIGHT_BIT else [OPENS2S, DECODER]
    return [*names, WAVLM] if needs_wavlm(models / base, place) else names


def choose_base(models: Path, place: PlaceConfig) -> str:
    """The model that a start needs: one that was deleted on purpose is not fetched again."""
    replaced = place.llm in REPLACEABLE and is_there(models / EIGHT_BIT)
    if not replaced or is_there(models / OPENS2S):
        return OPENS2S
    if EIGHT_BIT in Manifest(models).names():
        check(Manifest(models), EIGHT_BIT)
    return EIGHT_BIT


def needs_wavlm(base: Path, place: PlaceConfig) -> bool:
    """Whether the audio encoder is a WavLM that the checkpoint itself does not bring."""
    wanted = place.audio_encoder == "wavlm" or is_wavlm(base)
    return wanted and wavlm_paths(base.parent, base).body is not None


def bring(names: Sequence[str], models: Path, place: PlaceConfig, hub: HubConfig) -> None:
    """Fetches those of `names` that are not there."""
    missing = [name for name in names if not settle(models / name, hub)]
    there = [name for name in names if name not in missing]
    for name in [name for name in Manifest(models).names() if name in there]:
        tell_origin(models / name, hub)
    if not missing:
        return
    logger.info("to be fetched into %s: %s", models, ", ".join(missing))
    choose_target(place)  # what the worker would refuse is better known before 22 GB
    from omnispeech.download.directory import fetch_all

    fetch_all(missing, models, hub, deep=False)


def tell_origin(path: Path, hub: HubConfig) -> None:
    """Settings that name another repository than the one that is there change nothing by
    themselves."""
    model, made = known_model(path.name, hub), Manifest(path.parent).entry(path.name).made
    there = (made.get("repo", model.repo), made.get("revision", model.revision))
    if there != (model.repo, model.revision):
        logger.warning(
            "%s is from %s, revision %s; for %s, revision %s, as set: %s --update",
            path,
            *there,
            model.repo,
            model.revision,
            mend_command(path, hub),
        )


def convert_decoder(directory: Path) -> None:
    """Once; one that no longer fits its pickle is made again by whoever loads it."""
    pickles = [directory / name for name in PICKLES if (directory / name).exists()]
    if all(path.with_suffix(".safetensors").exists() for path in pickles):
        return
    if os.access(directory, os.W_OK):
        from omnispeech.checkpoint.decoder import load_decoder

        logger.info("converting %s", directory)
        load_decoder(directory)
