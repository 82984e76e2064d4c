"""Named text sets for calibration: a file or directory of that name, else a data set of the hub.

Of a hub file only as much is read as is used.
"""

import gzip
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from omnispeech.calibration.items import Item, PlainText, read_items
from omnispeech.errors import ConfigError

DEFAULT_QUOTA = 128  # texts of each set
SHORTEST = 64  # characters: headings and empty lines are no texts
SPLITS = ("train", "valid")


@dataclass(frozen=True, slots=True)
class NamedSet:
    repository: str  # owner/name, and @revision if it is not the main one
    files: Mapping[str, str]  # pattern of the files of each split
    field: str = "text"


WIKITEXT = "wikitext-2-raw-v1"
NAMED = {
    "wikitext2": NamedSet(
        "Salesforce/wikitext",
        {"train": f"{WIKITEXT}/train-*.parquet", "valid": f"{WIKITEXT}/validation-*.parquet"},
    ),
    "c4": NamedSet(
        "allenai/c4",
        {"train": "en/c4-train.00000-of-*.json.gz", "valid": "en/c4-validation.00000-of-*.json.gz"},
    ),
    "pileval": NamedSet("mit-han-lab/pile-val-backup", {"valid": "val.jsonl.zst"}),
    "book": NamedSet(
        "bookcorpus/bookcorpus@refs%2Fconvert%2Fparquet",
        {"train": "plain_text/train/0000.parquet"},
    ),
    "github": NamedSet("codeparrot/codeparrot-clean-valid", {"valid": "*.json.gz"}, "content"),
    "stack": NamedSet("bigcode/the-stack-smol", {"train": "data/python/data.json"}, "content"),
}


def dataset_items(mixture: str, *, splits: Sequence[str] = SPLITS) -> list[Item]:
    """`mixture`: "name[:quota],..."; a name is a path for read_items, else one of NAMED.

    quota: texts to take; half of them from each split if a set has both. Raises ConfigError with
    everything that was not found: nothing is left out silently.
    """
    if unknown := [split for split in splits if split not in SPLITS]:
        raise ConfigError(f"split {unknown[0]!r} is unknown; allowed: {', '.join(SPLITS)}")
    items: list[Item] = []
    missing = []
    for name, quota in map(_parsed, filter(None, map(str.strip, mixture.split(",")))):
        try:
            items += _items(name, quota, splits)
        except ConfigError:
            raise
        except Exception as exc:  # the hub's client has those of its HTTP library, which changes
            missing.append(f"{name} ({_reason(exc)})")
    if missing:
        raise ConfigError(
            f"not found: {'; '.join(missing)}; allowed: a path, or with access to the hub "
            f"{', '.join(NAMED)}"
        )
    return items


def _parsed(entry: str) -> tuple[str, int]:
    name, separator, quota = entry.rpartition(":")
    if not separator:
        return entry, DEFAULT_QUOTA
    if not quota.isdecimal() or not int(quota):
        raise ConfigError(f"{entry!r}: the quota is {quota!r}; allowed: 1 or more texts")
    return name, int(quota)


def _items(name: str, quota: int, splits: Sequence[str]) -> list[Item]:
    if Path(name).exists():
        return read_items(Path(name))[:quota]
    if name not in NAMED:
        raise FileNotFoundError("neither a path nor a name that is known")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise FileNotFoundError("no such path, and HF_HUB_OFFLINE forbids to ask the hub")
    chosen = NAMED[name]
    patterns = [chosen.files[split] for split in splits if split in chosen.files]
    if not patterns:
        raise FileNotFoundError(f"it has no split {' or '.join(splits)}")
    share = -(-quota // len(patterns))
    found = [item for p in patterns for item in islice(_of_hub(chosen, p), share)]
    return found[:quota]


def _of_hub(chosen: NamedSet, pattern: str) -> Iterator[Item]:
    """Texts of the first file that fits, in its order."""
    files = _hub()
    paths = sorted(files.glob(f"datasets/{chosen.repository}/{pattern}"))
    if not paths:
        raise FileNotFoundError(f"the hub has no {chosen.repository}/{pattern}")
    with files.open(paths[0], "rb") as file:
        texts = (str(row[chosen.field]).strip() for row in _rows(file, paths[0], chosen.field))
        long_enough = (text for text in texts if len(text) >= SHORTEST)
        yield from (PlainText(text, f"{paths[0]}:{n}") for n, text in enumerate(long_enough, 1))


def _hub() -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem()


def _rows(file: IO[bytes], name: str, field: str) -> Iterator[Mapping[str, Any]]:
    if name.endswith(".parquet"):
        return _parquet_rows(file, field)
    if name.endswith(".gz"):
        return map(json.loads, gzip.open(file))
    if name.endswith(".zst"):
        return map(json.loads, _unpacked_zstd(file))
    return map(json.loads, file)


def _parquet_rows(file: IO[bytes], field: str) -> Iterator[Mapping[str, Any]]:
    parquet = _optional("pyarrow.parquet", "pyarrow").ParquetFile(file)
    for batch in parquet.iter_batches(batch_size=256, columns=[field]):
        yield from batch.to_pylist()


def _unpacked_zstd(file: IO[bytes]) -> IO[bytes]:
    unpacker = _optional("zstandard", "zstandard").ZstdDecompressor()
    return io.BufferedReader(unpacker.stream_reader(file))


def _optional(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as exc:
        raise ImportError(f"its files need {package}; run: pip install {package}") from exc


def _reason(exc: BaseException) -> str:
    """The first line: the hub's errors go on with advice."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0].rstrip(".")
