"""The audio encoder: Whisper's, with or without the pooling that Qwen2-Audio added."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from omnispeech.errors import CheckpointError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """The defaults are those of Qwen2-Audio, so a config that leaves them out still loads."""

    model_type: str = "qwen2_audio_encoder"
    num_mel_bins: int = 128
    d_model: int = 1280
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    max_source_positions: int = 1500
    activation_function: str = "gelu"

    def __post_init__(self) -> None:
        if self.activation_function not in ACTIVATIONS:
            raise CheckpointError(
                f"unknown activation_function {self.activation_function!r} of the audio encoder; "
                f"known: {', '.join(ACTIVATIONS)}"
            )
        if self.d_model % self.encoder_attention_heads:
            raise CheckpointError(
                f"d_model={self.d_model} of the audio encoder is not a multiple of "
                f"encoder_attention_heads={self.encoder_attention_heads}"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "EncoderConfig":
        """From the `audio_encoder_config` of a checkpoint; keys that are not ours are left."""
        model_type = raw.get("model_type", "qwen2_audio_encoder")
        if model_type not in ENCODERS:
            raise CheckpointError(
                f"unknown audio encoder {model_type!r}; known: {', '.join([*ENCODERS, 'wavlm'])}"
            )
        # A whole Qwen2-Audio config keeps the settings of its encoder one level deeper.
        settings = raw.get("audio_config", raw) | {"model_type": model_type}
        known = {f.name for f in fields(cls)} & settings.keys()
        defaults = WHISPER_DEFAULTS if model_type == "whisper" else {}
        return cls(**defaults | {name: settings[name] for name in known})


WHISPER_DEFAULTS: dict[str, Any] = {
    "num_mel_bins": 80,
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; every position sees every other."""
        q, k, v = (
            proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, H, T, D / H]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, H, T, D / H]
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.d_model
        self.self_attn = Attention(width, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(self.activation(self.fc1(self.final_layer_norm(x))))


class WhisperEncoder(nn.Module):
    """Works on segments of fixed length: what is padding in them is computed like the rest."""

    pools = False

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.d_model
        self.conv1 = nn.Conv1d(config.num_mel_bins, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(width)

    @property
    def segment_frames(self) -> int:
        """Mel frames of one segment."""
        return 2 * self.config.max_source_positions

    def forward(self, mel: Tensor) -> Tensor:
        """[B, M, T] -> [B, T / 2, D], or [B, T / 4, D] if it pools; T is segment_frames."""
        assert mel.shape[1:] == (self.config.num_mel_bins, self.segment_frames), mel.shape
        x = F.gelu(self.conv1(mel))  # [B, D, T]
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # [B, T / 2, D]
        x = x + self.embed_positions.weight
        for layer in self.layers:
            x = layer(x)
        if self.pools:
            x = F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)  # [B, T / 4, D]
        return self.layer_norm(x)

    def encode(self, mel: Tensor, valid_frames: int) -> Tensor:
        """[M, T] of one clip -> [T', D]: its segments joined, silence at the end included.

        Segments without a valid frame are not computed.
        """
        segments = -(-valid_frames // self.segment_frames)
        frames = segments * self.segment_frames
        if mel.shape[1] < frames:
            raise CheckpointError(
                f"a clip of {mel.shape[1]} mel frames does not fill the {segments} segments of "
                f"{self.segment_frames} of the audio encoder; chunk_length of the preprocessor "
                "must be a multiple of the segment"
            )
        x = mel[:, :frames].to(self.conv1.weight)
        x = x.reshape(len(x), segments, self.segment_frames).transpose(0, 1)  # [B, M, T]
        return self(x).flatten(0, 1)

    def output_length(self, valid_frames: int) -> int:
        """Valid mel frames of a clip -> valid encoder frames."""
        full, rest = divmod(valid_frames, self.segment_frames)
        return full * self._length(self.segment_frames) + self._length(rest)

    def _length(self, frames: int) -> int:
        convolved = (frames - 1) // 2 + 1
        return (convolved - 2) // 2 + 1 if self.pools else convolved


class Qwen2AudioEncoder(WhisperEncoder):
    """Halves the rate after the last layer."""

    pools = True


ENCODERS: dict[str, type[WhisperEncoder]] = {
    "qwen2_audio_encoder": Qwen2AudioEncoder,
    "qwen2_audio": Qwen2AudioEncoder,
    "whisper": WhisperEncoder,
}
