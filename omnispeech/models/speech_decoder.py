"""Everything that turns speech units into sound."""

from dataclasses import dataclass

import torch

from omnispeech.models.flow import Flow
from omnispeech.models.hift import HiFT


@dataclass(frozen=True, slots=True)
class SpeechDecoder:
    flow: Flow
    hift: HiFT

    @property
    def sample_rate_hz(self) -> int:
        return self.hift.config.sampling_rate

    @property
    def device(self) -> torch.device:
        return self.flow.input_embedding.weight.device
