"""The assembly: what hears, what thinks and what speaks, named as in the checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnispeech.errors import CheckpointError, RequestError
from omnispeech.models.adapter import Adapter, AdapterConfig
from omnispeech.models.qwen3 import CausalLM, Qwen3Config
from omnispeech.models.speech_lm import SpeechLM
from omnispeech.models.wavlm import WavLMConfig, WavLMEncoder
from omnispeech.models.whisper import ENCODERS, EncoderConfig, WhisperEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class OmniSpeechConfig:
    audio_encoder: EncoderConfig | WavLMConfig
    llm: Qwen3Config
    tts_lm: Qwen3Config
    conv_kernel_sizes: tuple[int, ...]
    adapter_inner_dim: int
    text_span: int  # LLM states the speech LM reads at a time
    unit_span: int  # units it writes after each text span

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "OmniSpeechConfig":
        """From a composite config.json, which has no model_type and leaves defaults out."""
        text_span, unit_span = _numbers(raw, "interleave_strategy", "1:2", ":", 2)
        return cls(
            audio_encoder=_audio_encoder(_nested(raw, "audio_encoder_config")),
            llm=Qwen3Config.from_dict(_nested(raw, "llm_config")),
            tts_lm=Qwen3Config.from_dict(_nested(raw, "tts_lm_config")),
            conv_kernel_sizes=_numbers(raw, "conv_kernel_sizes", "5,5", ",", None),
            adapter_inner_dim=raw.get("adapter_inner_dim", 512),
            text_span=text_span,
            unit_span=unit_span,
        )

    @property
    def adapter(self) -> AdapterConfig:
        return AdapterConfig(
            encoder_dim=self.audio_encoder.d_model,
            llm_dim=self.llm.hidden_size,
            inner_dim=self.adapter_inner_dim,
            kernel_sizes=self.conv_kernel_sizes,
        )


def _audio_encoder(raw: Mapping[str, Any]) -> EncoderConfig | WavLMConfig:
    known = WavLMConfig if raw.get("model_type") == WavLMConfig.model_type else EncoderConfig
    return known.from_dict(raw)


def build_encoder(config: EncoderConfig | WavLMConfig) -> WhisperEncoder | WavLMEncoder:
    if isinstance(config, WavLMConfig):
        return WavLMEncoder(config)
    return ENCODERS[config.model_type](config)


def _nested(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(raw.get(name), dict):
        raise CheckpointError(
            f"config.json has no {name}; it needs audio_encoder_config, llm_config and "
            "tts_lm_config, each an object"
        )
    return raw[name]


def _numbers(
    raw: Mapping[str, Any], name: str, default: str, separator: str, count: int | None
) -> tuple[int, ...]:
    parts = str(raw.get(name, default)).split(separator)
    if count not in (None, len(parts)) or not all(p.strip().isdecimal() and int(p) for p in parts):
        raise CheckpointError(
            f"{name}={raw[name]!r} in config.json; allowed: whole numbers of 1 or more, "
            f"as in {default!r}"
        )
    return tuple(int(part) for part in parts)


class OmniSpeech(nn.Module):
    def __init__(self, config: OmniSpeechConfig) -> None:
        super().__init__()
        self.config = config
        self.audio_encoder_model = build_encoder(config.audio_encoder)
        self.audio_adapter = Adapter(config.adapter)
        self.llm_model = CausalLM(config.llm)
        self.llm2tts = nn.Linear(config.llm.hidden_size, config.tts_lm.hidden_size, bias=False)
        self.llm_ln = nn.LayerNorm(config.tts_lm.hidden_size)
        self.tts_lm_model = SpeechLM(config.tts_lm)

    def embed_audio(
        self, features: Sequence[Tensor], valid_frames: Sequence[int], *, batch_rule: bool
    ) -> list[Tensor]:
        """[..., T] and the valid part of T, of each audio -> [T', H] of each.

        `batch_rule`: as the original, where the last vector of an audio depends on the longest
        audio of the request. Without it every audio is embedded as if it were alone.
        """
        encoder = self.audio_encoder_model
        frames = [
            encoder.encode(clip, valid) for clip, valid in zip(features, valid_frames, strict=True)
        ]
        lengths = [encoder.output_length(valid) for valid in valid_frames]
        return self.adapt_audio(frames, lengths, batch_rule=batch_rule)

    def adapt_audio(
        self, frames_per_audio: Sequence[Tensor], lengths: Sequence[int], *, batch_rule: bool
    ) -> list[Tensor]:
        """[T, D] encoder frames and the valid part of T, of each audio -> [T', H] of each."""
        longest = max(lengths, default=0)
        return [
            self._adapt(frames, length, longest if batch_rule else length)
            for frames, length in zip(frames_per_audio, lengths, strict=True)
        ]

    def _adapt(self, frames: Tensor, length: int, reach: int) -> Tensor:
        """[T, D] -> [T', H]; the convolutions see `reach` frames, of which `length` are valid."""
        if not length:
            return frames.new_zeros(0, self.config.llm.hidden_size)
        # The original does not blank the encoded silence behind a shorter audio.
        seen = frames[:reach]
        seen = nn.functional.pad(seen, (0, 0, 0, reach - len(seen)))
        return self.audio_adapter(seen[None])[0, : self.audio_adapter.output_length(length)]

    def splice(self, ids: Sequence[int], audios: Sequence[Tensor]) -> Tensor:
        """Token ids and [T', H] of each audio -> [L, H].

        A negative id stands where the next audio goes.
        """
        slots = [place for place, token in enumerate(ids) if token < 0]
        if len(slots) != len(audios):
            raise RequestError(
                f"the prompt has {len(slots)} audio slots and the request {len(audios)} audios; "
                "send one audio per slot"
            )
        device = self.llm_model.model.embed_tokens.weight.device
        text = torch.tensor([max(token, 0) for token in ids], dtype=torch.long, device=device)
        rows = self.llm_model.embed(text)  # [len(ids), H]
        pieces, start = [], 0
        for slot, audio in zip(slots, audios, strict=True):
            pieces += [rows[start:slot], audio.to(rows)]
            start = slot + 1
        return torch.cat([*pieces, rows[start:]])

    def speech_condition(self, states: Tensor) -> Tensor:
        """LLM states [T, H] -> what the speech LM reads: [T, D]"""
        return self.llm_ln(self.llm2tts(states))
