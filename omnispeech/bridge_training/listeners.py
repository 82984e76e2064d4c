"""Who hears the audio: WavLM, and the checkpoint's own encoder whose frames it is to give."""

from dataclasses import dataclass

import torch
from torch import Tensor

from omnispeech.audio.resample import Samples
from omnispeech.bridge_training.regression import windows
from omnispeech.errors import CheckpointError
from omnispeech.models.wavlm import Bridge, WavLMEncoder, bridged
from omnispeech.speech_calibration import Ears


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """One clip, by both. Frames t of the two encoders are of the same 40 ms.

    The bridge's windows are centred 2.5 ms behind the frames of the checkpoint's encoder. For some
    lengths one of the two makes a frame more, which reaches beyond the end of the sound: it is
    left out.
    """

    features: Tensor  # [F, hidden_size] of WavLM, about twice as many
    frames: Tensor  # [T, d_model] of the checkpoint's encoder

    def windows(self, bridge: Bridge) -> Tensor:
        """[T, hidden_size * 3]: what the first layer of the bridge sees for each frame."""
        conv = bridge.temporal_adapter
        seen = windows(self.features, conv.kernel_size[0], conv.stride[0], int(conv.padding[0]))
        return seen[: len(self.frames)]

    def bridged(self, bridge: Bridge) -> Tensor:
        """[T, d_model]: what the bridge makes of it."""
        return bridge(self.features)[: len(self.frames)]


class Listeners:
    def __init__(self, wavlm: WavLMEncoder, ears: Ears) -> None:
        self._wavlm, self._ears = wavlm, ears

    @torch.inference_mode()
    def hear(self, clip: Samples, name: str) -> Heard | None:
        """[N] of 30 s at most; None if it is too short for a frame.

        Raises CheckpointError, with `name`, for numbers that are not finite.
        """
        pieces = self._wavlm.pieces(torch.from_numpy(clip))
        if not pieces:
            return None
        features, frames = self._wavlm.features(pieces[0]), self._ears.encode(clip)
        for who, numbers in (("WavLM", features), ("the audio encoder", frames)):
            if not numbers.isfinite().all():
                raise CheckpointError(
                    f"{who} gives numbers that are not finite for {name}: its weights are damaged "
                    "or of too narrow a type; run `omnispeech verify --deep`"
                )
        both = min(bridged(len(features)), len(frames))
        return Heard(features, frames[:both]) if both else None

    def adapt(self, frames: Tensor) -> Tensor:
        """[T, d_model] -> [T', llm_dim]: what the language model is given."""
        return self._ears.adapt(frames)
