"""Puts the small model into a models directory, and knows it there."""

import filecmp
import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import (
    DECODER,
    OPENS2S,
    SMALL,
    made_by,
    small_anew,
    small_command,
)
from omnispeech.checkpoint.new_directories import make_directories
from omnispeech.checkpoint.whole_file import size_text
from omnispeech.config import HubConfig
from omnispeech.download.lock import locked
from omnispeech.download.models import publish_command
from omnispeech.download.present import is_filled
from omnispeech.errors import CheckpointError

logger = logging.getLogger(__name__)

NAMES = (OPENS2S, DECODER)
PLACE = Path(__file__).parent
CARD = PLACE / "MODEL_CARD.md"
MADE = {"by": SMALL}


def shipped(name: str) -> dict[str, Path]:
    """The files of a directory of the small model, by their paths inside it."""
    folder = PLACE / name
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {**files, "README.md": CARD} if name == OPENS2S else files


def shipped_size() -> int:
    """In bytes."""
    return sum(path.stat().st_size for name in NAMES for path in shipped(name).values())


def write_small(models: Path, way: str = "--models") -> list[str]:
    """`models/OpenS2S` and `models/glm-4-voice-decoder`, each whole or not there -> those written.

    One that is there as it is shipped stays. Raises CheckpointError for any other that is there.
    way: of `check_place`.
    """
    needed = f"the small model takes {size_text(shipped_size())}"
    with locked(models, way=way, full=needed):
        names = [name for name in NAMES if not is_as_shipped(models / name)]
        _write(models, names)
    return names


def _write(models: Path, names: Sequence[str]) -> None:
    make_directories(models, {name: partial(_copy, name) for name in names}, MADE)
    manifest = Manifest(models)
    for name in set(NAMES).difference(manifest.names()):
        manifest.enter(name, MADE)


def _copy(name: str, directory: Path) -> None:
    """The content alone: owner, rights and times are those of any new file."""
    for file, path in shipped(name).items():
        (directory / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, directory / file)


def is_as_shipped(path: Path) -> bool:
    """Whether every file is there with the bytes of this version; others may be there, too."""
    return all(
        (path / file).is_file() and filecmp.cmp(source, path / file, shallow=False)
        for file, source in shipped(path.name).items()
    )


def is_small(path: Path) -> bool:
    """Whether a directory holds its part of the small model, of this version or of another."""
    return is_filled(path) and (made_by(path) == SMALL or is_as_shipped(path))


def lacking(models: Path, hub: HubConfig, *, wanted: bool) -> list[str]:
    """Names of directories that a start writes; none where another OpenS2S lies.

    wanted: with --small. Raises CheckpointError for what is half a model and would stay one.
    """
    there = [name for name in NAMES if is_filled(models / name)]
    others = [name for name in there if not is_as_shipped(models / name)]
    if wanted and others and OPENS2S not in there:
        raise CheckpointError(
            f"{models / DECODER} is there already, and the small model brings its own; name "
            "another models directory, or leave --small (OMNISPEECH_SMALL) out"
        )
    if wanted and not others and len(there) < len(NAMES):
        return [name for name in NAMES if name not in there]
    _check_pair(models, hub)
    return []


def _check_pair(models: Path, hub: HubConfig) -> None:
    """Raises CheckpointError where one half of the small model lies, or is to come to, another.

    It has units of its own: the other half would be fetched, and the replies would be noise.
    """
    small = [name for name in NAMES if is_small(models / name)]
    if len(small) != 1:
        return
    (other,) = set(NAMES).difference(small)
    there = is_filled(models / other)
    completed = not there and is_as_shipped(models / small[0])
    raise CheckpointError(
        f"{models / small[0]} is of the small model and fits no other {other} than its own, which "
        f"is {'not the one there' if there else 'missing'}; for the whole small model: "
        f"{small_command(models) if completed else small_anew(models)}, for the published one: "
        f"{publish_command(models, hub)}"
    )


def tell_small(models: Path, hub: HubConfig) -> None:
    """Of a start that takes it."""
    command = publish_command(models, hub)
    logger.info(
        "%s holds the small model, which knows sums to twenty and a few words (%s); "
        "for the published one, 22 GB: %s",
        models,
        models / OPENS2S / "README.md",
        command,
    )
    if not all(is_as_shipped(models / name) for name in NAMES):
        logger.info("this version brings another one: %s", small_anew(models))
