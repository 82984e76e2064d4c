"""What a comparison with golden numbers found, one row per case and stage."""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    case: str
    stage: str
    difference: float  # the largest, absolute; inf where things that must be equal are not
    tolerance: float  # 0.0: must be equal

    @property
    def passed(self) -> bool:
        return not math.isnan(self.difference) and self.difference <= self.tolerance


def print_report(rows: Iterable[Row]) -> int:
    """Writes one line per row as it arrives; the exit status is 1 unless all of them passed."""
    compared = failed = 0
    sys.stdout.write(f"{'case':24} {'stage':28} {'difference':>11} {'tolerance':>10}\n")
    for row in rows:
        compared += 1
        failed += not row.passed
        verdict = "" if row.passed else "  FAILED"
        sys.stdout.write(
            f"{row.case:24} {row.stage:28} {row.difference:11.2e} {row.tolerance:10.0e}{verdict}\n"
        )
    sys.stdout.write(f"{compared} compared, {failed} failed\n")
    return int(failed > 0 or compared == 0)
