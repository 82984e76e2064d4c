"""Listening to everything that is fitted to: sums, saved now and then, from which a run goes on."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

from omnispeech.audio.io import SAMPLE_RATE_HZ
from omnispeech.bridge_training.clips import Split
from omnispeech.bridge_training.listeners import Listeners
from omnispeech.bridge_training.regression import Sums
from omnispeech.checkpoint.tensor_file import TensorFile
from omnispeech.models.wavlm import Bridge
from omnispeech.quantization.progress import Progress
from omnispeech.quantization.state import write_tensors

FILE = "statistics.safetensors"
SAVED_EVERY_S = 30.0
KINDS = ("training", "validation")


@dataclass(slots=True, eq=False)
class Statistics:
    """What was heard so far, in the order of the files."""

    training: Sums
    validation: Sums
    files: int = 0  # heard to their end
    clips: int = 0  # of the file after them
    samples: int = 0  # of all clips
    took_s: float = 0.0  # of earlier runs as well

    @property
    def seconds(self) -> int:
        """Of audio."""
        return self.samples // SAMPLE_RATE_HZ

    @classmethod
    def empty(cls, bridge: Bridge) -> "Statistics":
        conv, outputs = bridge.temporal_adapter, bridge.dimension_projection.out_features
        inputs = conv.in_channels * conv.kernel_size[0]
        return cls(Sums.zero(inputs, outputs), Sums.zero(inputs, outputs))

    @classmethod
    def read(cls, directory: Path, bridge: Bridge) -> "Statistics":
        """Those that an interrupted run has left; empty ones if there are none."""
        if not (directory / FILE).is_file():
            return cls.empty(bridge)
        file = TensorFile(directory / FILE)
        known = file.metadata
        return cls(
            _read_sums(file, KINDS[0]),
            _read_sums(file, KINDS[1]),
            files=int(known["files"]),
            clips=int(known["clips"]),
            samples=int(known["samples"]),
            took_s=float(known["took_s"]),
        )

    def write(self, directory: Path) -> None:
        tensors = {
            f"{kind}.{name}": tensor
            for kind in KINDS
            for name, tensor in getattr(self, kind).tensors().items()
        }
        counted = ("files", "clips", "samples", "took_s")
        metadata = {name: repr(getattr(self, name)) for name in counted}
        write_tensors(directory / FILE, tensors, metadata)


def _read_sums(file: TensorFile, kind: str) -> Sums:
    return Sums(**{f.name: file.read(f"{kind}.{f.name}") for f in fields(Sums)})


class Listening:
    """One pass over what is fitted to; every clip counts once, however often it is stopped."""

    def __init__(
        self, directory: Path, bridge: Bridge, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """directory: where the sums are saved. bridge: of the shape that is to be fitted."""
        self.done = Statistics.read(directory, bridge)
        self._directory, self._bridge, self._clock = directory, bridge, clock
        self._saved = clock()

    def run(self, split: Split, listeners: Listeners, progress: Progress) -> Statistics:
        """Saves every half a minute, and when it is through."""
        done = self.done
        total = round(sum(file.seconds for file in split.fitted))
        progress.start(total, min(total, done.seconds))
        for number, file in list(enumerate(split.fitted))[done.files :]:
            kind = done.training if number < len(split.training) else done.validation
            for clip in islice(file.clips(), done.clips, None):
                if heard := listeners.hear(clip, file.name):
                    kind.add(heard.windows(self._bridge), heard.frames)
                done.clips += 1
                done.samples += len(clip)
                self._save_in_time()
                progress.step(min(total, done.seconds))
            done.files, done.clips = done.files + 1, 0
        self._save()
        return done

    def _save_in_time(self) -> None:
        if self._clock() - self._saved >= SAVED_EVERY_S:
            self._save()

    def _save(self) -> None:
        now = self._clock()
        self.done.took_s += now - self._saved
        self._saved = now
        self.done.write(self._directory)
