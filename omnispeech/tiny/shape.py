"""How large the networks of a random checkpoint are."""

from dataclasses import dataclass, field

from omnispeech.tiny.decoder import DecoderShape
from omnispeech.tiny.wavlm import WavLMShape


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageShape:
    hidden: int
    inner: int
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 16
    context: int = 40960  # positions


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyShape:
    """Sizes of the networks; the defaults make about 4 MB.

    Inputs of the linears of both language models are multiples of 128, as of the published ones:
    whatever quantizes those quantizes these.
    """

    encoder_width: int = 64
    encoder_inner: int = 128
    encoder_layers: int = 2
    encoder_heads: int = 4
    segment_s: int = 30  # of sound that the encoder takes at a time
    adapter_inner: int = 32
    llm: LanguageShape = LanguageShape(hidden=128, inner=256, head_width=32)
    speech: LanguageShape = LanguageShape(hidden=128, inner=128, heads=8, head_width=32)
    decoder: DecoderShape = field(default_factory=DecoderShape)
    wavlm: WavLMShape = field(default_factory=WavLMShape)
    merges: int = 300  # of the text tokenizer
    units: int = 512
    shards: int = 2
    text_length: int = 32  # tokens of a sampled reply, about, on average
    speech_tail: int = 24  # units after the text has ended, likewise
    unit_limit: int = 100  # of one reply: 8 s of speech
