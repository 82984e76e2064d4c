"""How large the trained model is, and where its settings are written before it is trained."""

from pathlib import Path

from omnispeech.models.flow import FlowConfig
from omnispeech.models.hift import HiFTConfig
from omnispeech.models.omnispeech import OmniSpeechConfig
from omnispeech.tiny.decoder import DecoderShape, write_decoder_config
from omnispeech.tiny.opens2s import write_settings
from omnispeech.tiny.shape import LanguageShape, TinyShape
from omnispeech.tiny.tokenizer import train_words
from training.answers import UNITS
from training.domain import DO_NOT_KNOW, OPENINGS, SPOKEN, every_word

CONTEXT = 384  # of the longest talks it is trained on; it fails beyond them
SHAPE = TinyShape(
    encoder_width=96,
    encoder_inner=384,
    encoder_layers=3,
    encoder_heads=4,
    segment_s=4,
    adapter_inner=64,
    llm=LanguageShape(hidden=128, inner=384, layers=3, head_width=32, context=CONTEXT),
    speech=LanguageShape(hidden=128, inner=256, layers=4, head_width=32),
    decoder=DecoderShape(
        unit_width=64,
        encoder_width=96,
        encoder_heads=4,
        encoder_inner=192,
        encoder_layers=2,
        unet_width=96,
        unet_heads=4,
        unet_head_width=24,
        unet_blocks=1,
        unet_middle=1,
        vocoder_width=64,
        pitch_width=48,
        guidance=0.0,
    ),
    merges=900,
    units=UNITS,
    shards=1,
    unit_limit=128,
)


def training_text() -> str:
    """Every word often enough, with and without a space or a capital, to be one token."""
    said = sorted(set(every_word()))
    first = sorted({*SPOKEN, *(phrase.split()[0] for phrase in OPENINGS)})
    forms = [f" {w}" for w in said]
    forms += [form for w in first for form in (f"\n{w}", f"\n{w.capitalize()}")]
    answers = [f"\n{w.capitalize()}." for w in SPOKEN] * 2
    frame = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", DO_NOT_KNOW, "?"]
    return "".join((forms + answers + frame) * 4)


def write_opens2s_settings(directory: Path) -> OmniSpeechConfig:
    directory.mkdir(parents=True, exist_ok=True)
    words = train_words(SHAPE.merges, training_text())
    return OmniSpeechConfig.from_dict(write_settings(directory, SHAPE, words).config)


def write_decoder_settings(directory: Path) -> tuple[FlowConfig, HiFTConfig]:
    directory.mkdir(parents=True, exist_ok=True)
    return write_decoder_config(directory, SHAPE.decoder, SHAPE.units)
