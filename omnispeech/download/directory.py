"""Brings directories of a models directory, or what they lack, and enters them."""

import logging
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omnispeech.checkpoint.manifest import FileRecord, Manifest, record_file
from omnispeech.checkpoint.models_directory import SMALL, fetch_command, is_there, made_by
from omnispeech.checkpoint.whole_file import size_text
from omnispeech.config import HubConfig
from omnispeech.download.hub import FAILURES, Hub, HubFile, Listing, offline, offline_mode
from omnispeech.download.lock import locked
from omnispeech.download.models import Model, known_model, publish_command
from omnispeech.download.partial import Partial
from omnispeech.download.present import ENTERED, compare, is_entered, room_for
from omnispeech.download.progress import Progress
from omnispeech.download.retries import Patience, Retries
from omnispeech.download.transfer import Transfer
from omnispeech.download.verification import matches
from omnispeech.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

OURS = ("omnispeech fetch", ENTERED["by"])  # entries of what a hub can mend
PATIENCE = Patience()


@dataclass(frozen=True, slots=True)
class Plan:
    """What one directory still lacks."""

    listing: Listing
    partial: Partial
    present: Mapping[str, FileRecord]  # files of the directory that are as on the hub

    @property
    def missing(self) -> list[HubFile]:
        here = self.present.keys() | self.partial.records(self.listing.files).keys()
        return [file for file in self.listing.files if file.path not in here]

    @property
    def bytes_missing(self) -> int:
        return sum(max(0, file.size - self.partial.grown(file)) for file in self.missing)


def fetch(name: str, models_directory: Path, hub: HubConfig, *, update: bool = False) -> Path:
    """`models_directory/name`, whole, verified and entered in the manifest.

    One that is there is compared by every byte; only files that are missing or differ are fetched,
    and those there are kept until then. It stays at the commit it came from, or with `update`
    goes to the one that the revision names now.
    """
    return fetch_all([name], models_directory, hub, update=update)[0]


def fetch_all(
    names: Sequence[str],
    models_directory: Path,
    hub: HubConfig,
    *,
    deep: bool = True,
    update: bool = False,
    patience: Patience = PATIENCE,
) -> list[Path]:
    """As `fetch`; whether the disk has room is asked for all `names` together.

    deep: False compares what is there by sizes and times, for one that was not there just now.
    """
    paths = [models_directory / known_model(name, hub).name for name in names]
    source = Hub(hub.hub_endpoint)
    with locked(models_directory):
        if not update:
            _refuse_small(paths, hub)
        lacking = [path.name for path in paths if deep or not is_entered(path)]
        wanted = [known_model(name, hub) for name in lacking]
        found = [_plan(model, models_directory, source, patience, update) for model in wanted]
        plans = [plan for plan in found if plan is not None]
        _check_room(plans, models_directory)
        for plan in plans:
            _bring(plan, source, patience, hub.connections)
    return paths


def _refuse_small(paths: Sequence[Path], hub: HubConfig) -> None:
    """Whole as it is, it is not what is asked for."""
    for path in paths:
        if is_there(path) and made_by(path) == SMALL:
            raise CheckpointError(
                f"{path} is of the small model that comes with omnispeech; for the published one "
                f"in its place: {publish_command(path.parent, hub)}"
            )


def _plan(
    model: Model, models_directory: Path, source: Hub, patience: Patience, update: bool
) -> Plan | None:
    """None: there is nothing to fetch."""
    partial = Partial(models_directory, model.name)
    if partial.finish() and not update:
        logger.info("%s was fetched before; it has its name now", partial.target)
        return None
    hashed, commit = dict[str, FileRecord](), ""
    if model.name in Manifest(models_directory).names() and is_there(partial.target):
        whole, hashed = compare(partial.target)
        if whole and not update:
            logger.info("%s is whole: nothing to fetch", partial.target)
            return None
        if not update:
            model, commit = _origin(model, partial.target)
    if offline_mode():
        raise offline(model.name)
    listing = _listing(source, model, commit, patience)
    partial.clear(listing.files)
    return Plan(listing, partial, _present(partial.target, listing, hashed))


def _origin(model: Model, path: Path) -> tuple[Model, str]:
    """Where the files of an entered directory came from, whatever the settings name now."""
    made = Manifest(path.parent).entry(path.name).made
    if made.get("by") not in OURS:
        raise CheckpointError(
            f"{path} was made by {made.get('by', 'another program')!r} and comes from no hub; make "
            f"it again, or delete it and run: {fetch_command(path.parent, path.name)}"
        )
    if "commit" not in made:  # it came by hand
        return model, ""
    return replace(model, repo=made["repo"], revision=made["revision"]), made["commit"]


def _listing(source: Hub, model: Model, commit: str, patience: Patience) -> Listing:
    retries = Retries(source, model, patience, threading.Event())
    while True:
        try:
            return source.listing(model, commit)
        except FAILURES as exc:
            if commit and source.is_missing(exc):
                raise ConfigError(
                    f"{model.repo} at {source.endpoint} has commit {commit} no more, from which "
                    f"{model.name} came (404): --update goes to what {model.revision!r} names now"
                ) from exc
            retries.failed(exc, model.repo)


def _present(
    directory: Path, listing: Listing, hashed: Mapping[str, FileRecord]
) -> dict[str, FileRecord]:
    """hashed: records of just now. Others are made here, of files of the right size."""
    present = {}
    if directory.exists() and not hashed:
        logger.info("comparing %s with %s", directory, listing.model.repo)
    for file in listing.files:
        path = directory / file.path
        if path.is_file() and path.stat().st_size == file.size:
            record = hashed.get(file.path) or record_file(path)
            if matches(path, record, file):
                present[file.path] = record
    return present


def _check_room(plans: Sequence[Plan], models_directory: Path) -> None:
    needed = sum(plan.bytes_missing for plan in plans)
    free = shutil.disk_usage(models_directory).free
    if (room := room_for(needed)) > free:
        raise CheckpointError(
            f"{models_directory} has {size_text(free)} free; {size_text(needed)} are still to be "
            f"fetched, and {size_text(room - needed)} should stay free: make room, or name a "
            "directory on a larger disk with --models"
        )


def _bring(plan: Plan, source: Hub, patience: Patience, connections: int) -> None:
    listing, missing = plan.listing, plan.missing
    name, total = listing.model.name, sum(file.size for file in listing.files)
    if missing:
        logger.info(
            "fetching %s: %d of %d files, %s, from %s at commit %s",
            name,
            len(missing),
            len(listing.files),
            size_text(plan.bytes_missing),
            listing.model.repo,
            listing.commit,
        )
        progress = Progress(name, total, total - plan.bytes_missing)
        Transfer(source, listing, plan.partial, patience, progress).run(missing, connections)
    plan.partial.publish(listing, plan.present)
    logger.info("%s is whole: every file has the hash that the hub names", plan.partial.target)
