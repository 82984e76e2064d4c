"""A finished model directory -> a repository on a Hugging Face hub."""

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from omnispeech.errors import CheckpointError, ConfigError, OmniSpeechError, Unavailable

# what an interrupted run may have left behind is nobody's download
NOT_SENT = [".*", "**/.*", "*.partial", "**/*.partial"]

# the error above that of a status: httpx.HTTPError, whichever httpx the library is built on
ConnectionFailure: type[Exception] = HfHubHTTPError.__bases__[0]


def check_repository(repo: str) -> None:
    """Raises ConfigError for what is no name of a repository; asks no hub."""
    try:
        validate_repo_id(repo)
    except HFValidationError as exc:
        raise ConfigError(f"{repo!r} is no name of a repository: {exc}; use USER/NAME") from exc


def push_to_hub(
    directory: Path, repo: str, token: str | None = None, *, private: bool | None = None
) -> str:
    """Uploads every file of `directory` to `repo`, made if it is not there; gives its address.

    token: else HF_TOKEN, else that of `hf auth login`. HF_ENDPOINT names another hub.
    private: None leaves it to the account's own default.
    Raises ConfigError for a name or a token the hub refuses, Unavailable where it cannot be
    reached or fails.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json; it is no model that could be sent")
    check_repository(repo)
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token or None)
    try:
        url = hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(
            folder_path=directory,
            repo_id=url.repo_id,
            ignore_patterns=list(NOT_SENT),
            commit_message=f"Upload {directory.name}",
        )
    except (ConnectionFailure, OSError, RuntimeError) as exc:
        raise _refusal(exc, repo, hub.endpoint) from exc
    return str(url)


def _refusal(error: Exception, repo: str, endpoint: str) -> OmniSpeechError:
    status = _status(error)
    if status == 401:
        return ConfigError(
            f"{endpoint} does not accept the token (401); set HF_TOKEN to one that may write, "
            "or run: hf auth login"
        )
    if status == 403:
        return ConfigError(
            f"{endpoint} does not let this token write to {repo} (403); use a token with write "
            "access, or a repository of your own"
        )
    what = "could not be reached" if status is None else f"answered with status {status}"
    return Unavailable(
        f"{endpoint} {what}: {error.__cause__ or error}; the model on disk is whole, push it later"
    )


def _status(error: BaseException | None) -> int | None:
    """Failures of single files come wrapped: the answer of the hub is with one of the causes."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        error = error.__cause__
    return None
