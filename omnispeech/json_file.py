"""The JSON files of a checkpoint, each of which holds one object."""

import json
from pathlib import Path
from typing import Any

from omnispeech.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError, with the path, if it is missing, damaged, or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path} is missing") from exc
    except ValueError as exc:
        raise CheckpointError(f"{path} is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__} instead of an object")
    return value
