"""What came of a training: as JSON beside the bridge, as lines for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json
from omnispeech.quantization.progress import duration

JSON = "bridge_report.json"
CONSTANT, UNTRAINED, TRAINED = "constant", "untrained", "trained"
WORDS = {
    CONSTANT: "mean of the training frames",
    UNTRAINED: "untrained bridge",
    TRAINED: "trained bridge",
}
POOR = 0.8  # relative error above which a bridge tells little of what the encoder heard


@dataclass(frozen=True, slots=True)
class BridgeReport:
    output: Path
    data: Mapping[str, Any]
    found: bool = False  # it was there already

    @property
    def made(self) -> dict[str, Any]:
        """For the manifest."""
        by = {"by": "omnispeech train-bridge"}
        return by | {name: self.data[name] for name in ("signature", "audio", "errors")}

    def lines(self) -> list[str]:
        data = self.data
        found = [f"{self.output} is there already, whole, and of the same audio and models"]
        return [
            *(found if self.found else []),
            *_audio_lines(data["audio"], data["fit"]),
            *_error_lines(data["errors"], data["audio"]["held_out"]),
            *_file_lines(data["held_out_files"]),
            *_remarks(data["errors"]),
            _time_line(data["measured"], data["audio"]),
            f"Serve it with: python model_worker.py --models {self.output.parent} "
            "--audio-encoder wavlm",
        ]


def read_report(output: Path) -> BridgeReport:
    """Of a result that is there; raises CheckpointError if it has none that is whole."""
    data = read_json(output / JSON)
    if data.keys() < {"signature", "audio", "fit", "errors", "held_out_files", "measured"}:
        raise CheckpointError(f"{output / JSON} is not whole")
    return BridgeReport(output, data, found=True)


def _audio_lines(audio: Mapping[str, Any], fit: Mapping[str, Any]) -> list[str]:
    fitted = [audio["training"], audio["validation"]]
    files = sum(part["files"] for part in fitted)
    seconds = sum(part["seconds"] for part in fitted)
    return [
        f"Fitted to {duration(seconds)} of audio ({files} files, {fit['frames']} frames, "
        f"{fit['columns']} numbers for each output); ridge {fit['ridge']:.2g}",
    ]


def _error_lines(errors: Mapping[str, Mapping[str, float]], held: Mapping[str, Any]) -> list[str]:
    widest = max(map(len, WORDS.values()))
    places = (errors["encoder"], errors["adapter"])
    return [
        f"Relative error on {held['files']} files that were held out "
        f"({duration(held['seconds'])}); 0: the encoder itself, 1: the best constant",
        f"  {'':{widest}}  behind the encoder  behind the adapter",
        *(
            f"  {words:{widest}}" + "".join(f"  {place[rival]:18.3f}" for place in places)
            for rival, words in WORDS.items()
        ),
    ]


def _file_lines(files: Mapping[str, float]) -> list[str]:
    ordered = list(files.items())
    (best, lowest), (worst, highest) = ordered[0], ordered[-1]
    return [
        f"By file: {lowest:.3f} ({best}) to {highest:.3f} ({worst}), half of them below "
        f"{median(files.values()):.3f}"
    ]


def _remarks(errors: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
    error = errors["encoder"][TRAINED]
    if error < POOR:
        return []
    return [
        f"An error of {error:.2f} is hardly better than a constant: expect poor understanding; "
        "train on more audio of the kind that will be heard"
    ]


def _time_line(measured: Mapping[str, Any], audio: Mapping[str, Any]) -> str:
    per_hour = measured["listening_s"] / max(1e-9, measured["listened_s"]) * 3600
    return (
        f"Took {duration(measured['total_s'])} on {measured['device']}, of which fitting "
        f"{duration(measured['fitting_s'])}; listening took {duration(per_hour)} per hour of audio"
    )
