"""WavLM in place of the published audio encoder: it reads samples, and a trained bridge turns its
features into what the adapter knows.

The network itself is that of transformers, its gated relative position bias included.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations

from omnispeech.errors import CheckpointError

D_MODEL = 1280  # of the published encoder
PIECE = 480_000  # samples heard at a time: 30 s, as long as a segment of the published encoder
QUIETEST = 1e-7  # added to the variance, as the feature extractor of transformers does

# Masking is of training alone: with it off the network has no tensor for it.
SERVED = {
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "return_dict": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WavLMConfig:
    """body: the config.json of a WavLM; what it leaves out is as in wavlm-base."""

    model_type: ClassVar[str] = "wavlm"
    d_model: int = D_MODEL  # what the adapter reads
    do_normalize: bool = False  # each clip to zero mean and unit variance before it is heard
    body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            kernels, strides, _ = self.kernels, self.strides, self.hidden_size
            smallest = min((*kernels, *strides, 1))
        except (TypeError, ValueError) as exc:
            raise CheckpointError(f"the config of WavLM cannot be read: {exc}") from exc
        if not kernels or len(kernels) != len(strides) or smallest < 1:
            raise CheckpointError(
                f"conv_kernel={list(kernels)} and conv_stride={list(strides)} of WavLM; "
                "allowed: equally many, each 1 or more"
            )
        if self.body.get("add_adapter"):
            raise CheckpointError(
                "add_adapter of WavLM is on; the bridge is the only adapter that can follow it: "
                "use wavlm-base-plus"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "WavLMConfig":
        """From the `audio_encoder_config` of a checkpoint.

        One of the published encoder that was renamed, as the fork does, says nothing of WavLM.
        """
        body = {} if "encoder_layers" in raw else dict(raw)
        return cls(
            d_model=raw.get("d_model", D_MODEL),
            do_normalize=trained_on_normalized(body),
            body=body,
        )

    @property
    def hidden_size(self) -> int:
        """Width of its features."""
        return int(self.body.get("hidden_size", 768))

    @property
    def kernels(self) -> tuple[int, ...]:
        return tuple(self.body.get("conv_kernel", (10, 3, 3, 3, 3, 2, 2)))

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.body.get("conv_stride", (5, 2, 2, 2, 2, 2, 2)))


def trained_on_normalized(body: Mapping[str, Any]) -> bool:
    """The large WavLMs, which differ in their norms, were trained on normalized clips."""
    return body.get("feat_extract_norm", "group") == "layer"


class Bridge(nn.Module):
    """Features of WavLM at 50 Hz -> frames as the adapter knows them, at 25 Hz."""

    def __init__(self, hidden_size: int = 768, d_model: int = D_MODEL) -> None:
        super().__init__()
        self.temporal_adapter = nn.Conv1d(hidden_size, hidden_size, 3, stride=2, padding=1)
        self.dimension_projection = nn.Linear(hidden_size, d_model)

    def forward(self, features: Tensor) -> Tensor:
        """[T, hidden_size] -> [bridged(T), d_model]; T is 1 or more"""
        halved = self.temporal_adapter(features.T[None])[0].T  # [T', hidden_size]
        return self.dimension_projection(halved)


def bridged(features: int) -> int:
    """Features of WavLM -> frames behind the bridge."""
    return (features - 1) // 2 + 1


class WavLMEncoder(Bridge):
    """A WavLM in front of its bridge. A clip is heard alone and in pieces of 30 s: nothing is
    padded, so there is nothing to mask."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__(config.hidden_size, config.d_model)
        self.config = config
        self.wavlm = _build_body(config.body)

    @property
    def _weight(self) -> Tensor:
        """One that has the device and the type of all."""
        return next(self.wavlm.parameters())

    def pieces(self, clip: Tensor) -> list[Tensor]:
        """[N] samples at 16 kHz in [-1, 1] -> those that give features, each [PIECE] or shorter."""
        clip = clip.to(self._weight.device, torch.float32)
        if self.config.do_normalize and len(clip):
            clip = (clip - clip.mean()) / (clip.var(correction=0) + QUIETEST).sqrt()
        pieces = (clip[start : start + PIECE] for start in range(0, len(clip), PIECE))
        return [piece for piece in pieces if self.features_of(len(piece))]

    def features(self, samples: Tensor) -> Tensor:
        """[N] of one piece -> [features_of(N), hidden_size]"""
        assert len(samples) <= PIECE, len(samples)
        heard = self.wavlm(samples[None].to(self._weight))
        return heard.last_hidden_state[0]

    def encode(self, samples: Tensor, valid: int) -> Tensor:
        """[N] of one clip, of which `valid` are sound -> [output_length(valid), d_model]"""
        pieces = self.pieces(samples[:valid])
        empty = self._weight.new_zeros(0, self.config.d_model)
        return torch.cat([empty, *(self(self.features(piece)) for piece in pieces)])

    def output_length(self, valid: int) -> int:
        """Samples of a clip -> its frames, 750 of each full piece."""
        full, rest = divmod(valid, PIECE)
        whole, part = (bridged(self.features_of(samples)) for samples in (PIECE, rest))
        return full * whole + part

    def features_of(self, samples: int) -> int:
        """Features that WavLM makes of one piece."""
        count = samples
        for kernel, stride in zip(self.config.kernels, self.config.strides, strict=True):
            count = max(0, (count - kernel) // stride + 1)
        return count


def _build_body(raw: Mapping[str, Any]) -> nn.Module:
    """The weight norm of its positions is for training: here they are one plain weight."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import WavLMConfig as BodyConfig
    from transformers import WavLMModel

    try:
        body = WavLMModel(BodyConfig.from_dict({**raw, **SERVED}))
    except (
        StrictDataclassError,
        ArithmeticError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as exc:
        raise CheckpointError(f"no WavLM can be built from its config: {exc}") from exc
    remove_parametrizations(body.encoder.pos_conv_embed.conv, "weight")
    return body
