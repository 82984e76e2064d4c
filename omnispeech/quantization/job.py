"""What one quantization run works on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnispeech.calibration.samples import Calibration
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.quantization.memory import Peak
from omnispeech.quantization.method import Method
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.plan import Conversion, stream_dtype
from omnispeech.quantization.run_settings import RunSettings
from omnispeech.quantization.state import Streams
from omnispeech.quantization.stream import Stream

Build = Callable[[MethodSettings], Method]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Job:
    source: LanguageFiles
    calibration: Calibration
    method: MethodSettings
    settings: RunSettings
    conversion: Conversion
    output: Path
    build: Build
    signature: Mapping[str, Any]
    calibration_peak: Peak | None  # None: not measured

    @property
    def layers(self) -> int:
        return self.source.config.num_hidden_layers

    @property
    def device(self) -> torch.device:
        return torch.device(self.settings.device)

    def first_streams(self) -> Streams:
        """In front of the first layer: the float and the quantized model read the same."""
        dtype = stream_dtype(self.source)
        states = [sample.vectors.to("cpu", dtype) for sample in self.calibration.samples]
        return Streams(
            done=0,
            batch_tokens=self.settings.batch_tokens,
            counted=[sample.counted for sample in self.calibration.samples],
            floats=states,
            quantized=states,
        )

    def stream(self, streams: Streams, states: Sequence[Tensor]) -> Stream:
        return Stream(
            self.source.config,
            states,
            streams.counted,
            device=self.device,
            batch_tokens=streams.batch_tokens,
        )


def run_signature(
    source: LanguageFiles, calibration: Calibration, method: MethodSettings, conversion: Conversion
) -> dict[str, Any]:
    """What decides the result; sizes of micro-batches and of shards may change on the way."""
    return {
        "source": source.fingerprint(),
        "calibration": calibration.digest,
        "method": _resolved(method),
        "layout": conversion.scheme.layout,
        "kept": list(conversion.kept),
    }


def _resolved(method: MethodSettings) -> dict[str, Any]:
    """A default and the same thing asked for are one; what has no effect on the result is None.

    Salient columns are in every report, so it does not matter whether they were asked for.
    """
    compensated = method.rounds == "gptq"
    return {
        "method": method.method,
        "bits": method.bits,
        "group_size": method.group_size,
        "zero_point": not method.symmetric,
        "rounding": method.rounds,
        "compatible": method.compatible,
        "compatible_dtype": method.compatible_dtype if method.compatible else None,
        "duo_scaling": method.duo if method.method == "awq" else None,
        "apply_clip": method.clips,
        "search_step": method.search_step,
        "passes": method.passes,
        "desc_act": method.act_order,
        "static_groups": method.fixed_groups,
        "damping": method.damping if compensated else None,
        "salient_quota": method.salient_quota,
    }
