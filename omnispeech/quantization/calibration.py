"""What the quantizer listens to: sequences of vectors as the language model reads them."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    vectors: Tensor  # [T, D] what the first layer reads: embeddings, or sound spliced into them
    counted: Tensor  # [T] bool: tokens that statistics and losses are taken over


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Calibration:
    samples: tuple[Sample, ...]
    tokens: Mapping[str, int]  # counted tokens of each kind: text, audio, ...
    sources: tuple[str, ...]  # where they are from, for the report
    digest: str  # sha256 of everything above: a run is only continued with the same
