"""The speech decoder against the numbers of the original, stage by stage.

The layout of a golden directory is told in `tests/golden/decoder/README.md`; runs, blocks and
stages are taken from what is stored, and what cannot be compared is a failing row.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.config import DecoderConfig
from omnispeech.engine.noise import Noise, OriginalNoise
from omnispeech.engine.vocoder import CompatibleStream
from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json
from omnispeech.models.speech_decoder import SpeechDecoder
from omnispeech.parity.decoder_stages import Recorder
from omnispeech.parity.report import Row

NOT_RUNS = {"inputs", "flow", "hift"}  # the last two are conversions of the weights

# The first pattern that fits the name of a stage
TOLERANCES = (
    (r"cfm_noise", 0.0),
    (r"cfm_t|time_emb_step\d+", 1e-5),
    (r"embedding|spk|enc_\w+|encoder_\w+|mu", 1e-5),
    (r"est_\w+|cfm_v_\w+_step0", 5e-5),
    (r"cfm_\w+|mel|flow_out|cache_mel|cache_overlap|hift_conv_pre|hift_up0", 1e-4),
    (r"f0", 2e-3),
    (r"source|cache_source|sine_waves", 1e-3),
    (r"wav|hift_\w+", 1e-2),
)
WAV_RMS = 1e-3
WAV_OF_STORED_SOURCE = 1e-5
CUT_SHORT = {"source", "sine_waves", "hift_conv_post"}  # their beginning may be all that is stored
CUT = 1024  # in whole multiples of it


class StoredNoise:
    """Instead of random numbers, those that the original was given."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self._inputs = inputs
        self._calls = 0

    def start(self, first: int, frames: int) -> Tensor:
        return self._inputs["cfm_noise"][:, :, first : first + frames]

    def phases(self) -> Tensor:
        phases = self._inputs["sine_phase"][self._calls : self._calls + 1].clone()
        if not len(phases):
            raise CheckpointError(f"sine_phase has no row for block {self._calls} of a run")
        phases[:, 0] = 0
        self._calls += 1
        return phases

    def sines(self, first: int, samples: int) -> Tensor:
        noise = self._inputs["sine_noise"]
        return noise[:, :, torch.arange(first, first + samples) % noise.shape[2]]


@dataclass(frozen=True, slots=True)
class Run:
    """What the decoder makes of one run: stages by their stored names, lengths per block."""

    stages: dict[str, Tensor]
    lengths: list[dict[str, int | bool]]


def compare(directory: Path) -> Iterator[Row]:
    """One row per stored tensor, and one for the lengths of each block."""
    decoder = load_decoder(directory, convert=False)
    inputs = _read(directory / "inputs.safetensors")
    meta = read_json(directory / "meta.json")
    files = {path.stem: path for path in sorted(directory.glob("*.safetensors"))}
    streams = {name: blocks for name, blocks in meta.items() if _is_stream(blocks)}
    for case in sorted((files.keys() | streams.keys()) - NOT_RUNS):
        stored = _read(files[case]) if case in files else {}
        if case == "native_rng":
            yield from compare_native(decoder, inputs, stored)
        else:
            yield from compare_case(decoder, inputs, case, stored, streams.get(case))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; is {path.parent} a golden directory?")
    return path


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(_existing(path))
    except SafetensorError as exc:
        raise CheckpointError(f"{path} is damaged: {exc}") from exc


def _is_stream(value: object) -> bool:
    """Whether an entry of meta.json tells the blocks of a run."""
    return isinstance(value, list) and all(isinstance(b, dict) and "tokens" in b for b in value)


def compare_case(
    decoder: SpeechDecoder,
    inputs: Mapping[str, Tensor],
    case: str,
    stored: Mapping[str, Tensor],
    blocks: list[dict[str, Any]] | None,
) -> Iterator[Row]:
    tokens = inputs.get(f"tokens_{case.rpartition('_')[2]}")
    if tokens is None or (blocks is None and not case.startswith("offline")):
        yield from (_uncompared(case, stage) for stage in (*stored, "lengths"))
        return
    sizes = [len(tokens)] if blocks is None else [int(block["tokens"]) for block in blocks]
    run = run_blocks(decoder, tokens.tolist(), sizes, StoredNoise(inputs))
    if blocks is None:
        run.stages.update(
            {name.removeprefix("block0."): stage for name, stage in run.stages.items()}
        )
    yield from compare_stages(case, stored, run.stages)
    if blocks is None:
        yield from compare_filter(decoder, case, stored)
    for k, block in enumerate(blocks or ()):
        ours = {**run.lengths[k], "block": k}
        equal = "samples" in block and all(ours[n] == block[n] for n in ours.keys() & block.keys())
        yield Row(case, f"block{k}.lengths", 0.0 if equal else math.inf, 0.0)


def compare_native(
    decoder: SpeechDecoder, inputs: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> Iterator[Row]:
    """The original's own random numbers, as drawn on a CPU."""
    for prefix in sorted({name.partition(".")[0] for name in stored}):
        ours = {n: value for n, value in stored.items() if n.partition(".")[0] == prefix}
        tokens = inputs.get(f"tokens_{re.sub(r'[^0-9]', '', prefix)}")
        if tokens is None:
            yield from (_uncompared("native_rng", name) for name in ours)
            continue
        run = run_blocks(decoder, tokens.tolist(), [len(tokens)], OriginalNoise(decoder))
        found = {f"{prefix}.{n.removeprefix('block0.')}": stage for n, stage in run.stages.items()}
        yield from compare_stages("native_rng", ours, found)


def run_blocks(decoder: SpeechDecoder, units: list[int], sizes: list[int], noise: Noise) -> Run:
    """Blocks of these sizes through the compatible mode; the last one is final."""
    stream = CompatibleStream(decoder, DecoderConfig(streaming="compatible"), noise)
    run = Run({}, [])
    waves = []
    with Recorder(decoder) as recorder:
        for k, size in enumerate(sizes):
            recorder.clear()
            final = k == len(sizes) - 1
            start = sum(sizes[:k])
            waves.append(stream.push(units[start : start + size], final)[None])
            stages = {
                **recorder.stages,
                "wav": waves[-1],
                "cache_mel": stream.last_frame,
                "cache_overlap": stream.ahead,
                "cache_source": stream.last_source,
            }
            run.stages.update({f"block{k}.{name}": stage for name, stage in stages.items()})
            given = {"tokens": size, "samples": waves[-1].shape[1], "finalize": final}
            run.lengths.append({**recorder.lengths(size), **given})
    run.stages["wav"] = torch.cat(waves, dim=1)
    return run


def compare_stages(
    case: str, stored: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> Iterator[Row]:
    for name, wanted in stored.items():
        stage = name.rpartition(".")[2]
        tolerance = next((t for pattern, t in TOLERANCES if re.fullmatch(pattern, stage)), None)
        if name not in found or tolerance is None:
            yield _uncompared(case, name)
            continue
        got = found[name]
        if stage in CUT_SHORT and wanted.shape[-1] % CUT == 0:
            got = got[..., : wanted.shape[-1]]
        yield Row(case, name, largest_difference(got, wanted), tolerance)
        if stage == "wav":
            yield Row(case, f"{name} rms", rms_difference(got, wanted), WAV_RMS)


def compare_filter(
    decoder: SpeechDecoder, case: str, stored: Mapping[str, Tensor]
) -> Iterator[Row]:
    """Sound made of the stored mel and source: without the phase, whose rounding adds up."""
    if not {"wav", "mel", "source"} <= stored.keys():
        return
    mel, source = stored["mel"], stored["source"]
    if source.shape[2] == mel.shape[2] * decoder.hift.config.hop:
        with torch.inference_mode():
            wav = decoder.hift(mel, source)
        difference = largest_difference(wav, stored["wav"])
        yield Row(case, "wav of stored source", difference, WAV_OF_STORED_SOURCE)


def largest_difference(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape or not wanted.numel():
        return math.inf
    return (got - wanted).abs().max().item()


def rms_difference(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape:
        return math.inf
    return (got - wanted).square().mean().sqrt().item()


def _uncompared(case: str, stage: str) -> Row:
    return Row(case, stage, math.inf, 0.0)
