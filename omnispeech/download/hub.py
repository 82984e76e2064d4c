"""The hub as `huggingface_hub` speaks to it: what a repository holds, and the bytes of a file."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
)

from omnispeech.config_reader import TRUE
from omnispeech.download.models import Model
from omnispeech.errors import CheckpointError, ConfigError, OmniSpeechError, Unavailable

HASH = "[0-9a-f]{40}|[0-9a-f]{64}"  # SHA-1 or SHA-256
LONGEST_NAME = 255 - 17  # bytes: what arrives bears a part of its hash behind its name
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # the library heeds both
LONGEST_WISH = 9  # digits of Retry-After that are read: decades
PASSING = (408, 425, 429)  # and 500 to 599: another attempt may succeed

# the error above that of a status: httpx.HTTPError, whichever httpx the library is built on
TransportFailure: type[Exception] = HfHubHTTPError.__bases__[0]
FAILURES = (TransportFailure, OfflineModeIsEnabled)


@dataclass(frozen=True, slots=True)
class HubFile:
    path: str  # in the repository, with forward slashes
    size: int
    blob_id: str  # git's SHA-1 of the content; of a large file, of the pointer to it
    sha256: str | None  # of the content of a large file

    @property
    def hash(self) -> str:
        """What the content is verified against."""
        return self.sha256 or self.blob_id


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a model at one commit."""

    model: Model
    commit: str
    files: tuple[HubFile, ...]

    @property
    def made(self) -> dict[str, str]:
        """Of the manifest."""
        model = self.model
        return {
            "by": "omnispeech fetch",
            "repo": model.repo,
            "revision": model.revision,
            "commit": self.commit,
        }


class Hub:
    def __init__(self, endpoint: str = "") -> None:
        """endpoint: else HF_ENDPOINT, else the hub of the library. The token is the library's:
        HF_TOKEN, else that of `hf auth login`; it goes to the endpoint and nowhere else.

        Raises ConfigError for what can be no token.
        """
        chosen = endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        _check_token(get_token() or "")
        self.endpoint = chosen.rstrip("/")
        self._api = HfApi(endpoint=self.endpoint)

    def listing(self, model: Model, commit: str = "") -> Listing:
        """The files of `model` at `commit`, else at the one that its revision names now.

        Raises ConfigError for a repository that is another model; FAILURES as they come.
        """
        try:
            info = self._api.model_info(
                model.repo,
                revision=commit or model.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
            files = tuple(_file(sibling) for sibling in info.siblings or ())
        except HFValidationError as exc:
            raise ConfigError(f"{model.repo!r} is no name of a repository: {exc}") from exc
        except FAILURES:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ConfigError(
                f"{self.endpoint} does not answer as a hub ({exc!r}); check HF_ENDPOINT"
            ) from exc
        return _wanted(model, info.sha or "", files)

    @contextmanager
    def read(
        self, listing: Listing, file: HubFile, start: int
    ) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Where the bytes begin, at `start` or at 0, and the bytes; FAILURES as they come."""
        url = hf_hub_url(
            listing.model.repo, file.path, revision=listing.commit, endpoint=self.endpoint
        )
        # the bytes that were hashed, not a compressed copy of them
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            yield start if response.status_code == 206 else 0, response.iter_bytes()

    def passes(self, error: Exception) -> bool:
        """Whether another attempt may succeed."""
        if isinstance(error, OfflineModeIsEnabled):
            return False
        status = _status(error)
        return status is None or status in PASSING or status >= 500

    def is_missing(self, error: Exception) -> bool:
        return _status(error) == 404

    def refusal(self, error: Exception, model: Model) -> OmniSpeechError:
        """What `error` means for whoever asked for `model`, and what to do."""
        status, name = _status(error), model.name
        what = f"{model.repo} at {self.endpoint}"
        if isinstance(error, OfflineModeIsEnabled):
            return offline(name)
        if status == 401:
            return ConfigError(
                f"{what} is not given to this user (401): set HF_TOKEN to a token that is valid "
                f"and may read it, and check the name of the repository ({model.flags})"
            )
        if status == 403:
            return ConfigError(
                f"{what} is not open to this token (403): accept the terms on its page, or set "
                "HF_TOKEN to a token of an account that may read it"
            )
        if status == 404:
            return ConfigError(
                f"{what} is not there, or not its revision {model.revision!r} (404): check "
                f"{model.flags}; a private repository needs HF_TOKEN"
            )
        if status is None or self.passes(error):
            return Unavailable(f"{what} cannot be fetched: {reason(error)}")
        return ConfigError(f"{what} was refused: {reason(error)}")


def offline_mode() -> bool:
    """As it was when the library was imported, or as it is now."""
    return constants.is_offline_mode() or bool(_offline_variables())


def offline(name: str) -> Unavailable:
    names = " and ".join(_offline_variables()) or OFFLINE[0]
    return Unavailable(
        f"{name} has to be fetched, and {names} is set: unset it, or copy the directory "
        "from another machine"
    )


def _offline_variables() -> list[str]:
    return [name for name in OFFLINE if os.environ.get(name, "").lower() in TRUE]


def reason(error: Exception) -> str:
    """One line, without the request: its headers hold the token."""
    status = _status(error)
    if status is not None:
        return f"the hub answered with status {status}"
    return str(error).partition("\n")[0] or type(error).__name__


def retry_after_s(error: Exception) -> float:
    """Seconds that the hub asks to wait; 0 if it does not, or in a date."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    text = error.response.headers.get("Retry-After", "")
    return float(text[:LONGEST_WISH]) if text.isdecimal() else 0.0


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _check_token(token: str) -> None:
    """An error of whoever sends it would show it."""
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(
            "the token (HF_TOKEN, or that of `hf auth login`) holds a sign that no token has, "
            "such as a typographic quote: set it again"
        )


def _file(sibling: Any) -> HubFile:
    path, large = str(sibling.rfilename), sibling.lfs
    leaves = PurePosixPath(path).is_absolute() or {"..", ""} & set(path.split("/"))
    if leaves or "\\" in path or not path.isprintable():
        raise ValueError(f"file name {path!r}")
    if max(len(part.encode()) for part in path.split("/")) > LONGEST_NAME:
        raise ValueError(f"a file name of more than {LONGEST_NAME} bytes: {path[:40]!r}...")
    file = HubFile(
        path=path,
        size=int(large.size if large else sibling.size),
        blob_id=str(sibling.blob_id),
        sha256=str(large.sha256) if large else None,
    )
    if not re.fullmatch(HASH, file.hash):  # it becomes a part of a file's name
        raise ValueError(f"hash {file.hash!r} of {path!r}")
    return file


def _wanted(model: Model, commit: str, files: tuple[HubFile, ...]) -> Listing:
    """Without hidden files: those are the repository's own."""
    chosen = tuple(
        file
        for file in files
        if not any(part.startswith(".") for part in file.path.split("/"))
        and any(fnmatch(file.path, pattern) for pattern in model.patterns)
    )
    paths = {file.path for file in chosen}
    for path in paths:
        if both := paths & {str(parent) for parent in PurePosixPath(path).parents}:
            raise CheckpointError(
                f"{model.repo} at revision {model.revision!r} has {path!r} and a file "
                f"{both.pop()!r}: no directory can hold both; check {model.flags}"
            )
    if missing := [path for path in model.needed if path not in paths]:
        raise CheckpointError(
            f"{model.repo} at revision {model.revision!r} has no {missing[0]}: it is no "
            f"{model.name}; check {model.flags}"
        )
    return Listing(model, commit, chosen)
