"""Finds out which kind of golden directory it was given."""

from collections.abc import Iterator
from pathlib import Path

from omnispeech.errors import CheckpointError
from omnispeech.parity.report import Row


def compare(directory: Path) -> Iterator[Row]:
    """Laid out like `tests/golden/opens2s` (expected-NAME/ beside NAME/) or `.../decoder`."""
    if any(directory.glob("expected-*")):
        from omnispeech.parity import opens2s

        return opens2s.compare(directory)
    if (directory / "flow.pt").exists():
        from omnispeech.parity import decoder

        return decoder.compare(directory)
    raise CheckpointError(
        f"{directory} is no golden directory; it should hold expected-NAME/ folders beside their "
        "checkpoints, or a speech decoder (config.yaml, flow.pt, hift.pt) beside its outputs"
    )
