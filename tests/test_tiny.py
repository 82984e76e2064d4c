import hashlib
import json
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from omnispeech.checkpoint.decoder import load_decoder
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.opens2s import load_opens2s
from omnispeech.errors import CheckpointError
from omnispeech.models.speech_decoder import SpeechDecoder
from omnispeech.prompt import AUDIO, AUDIO_SLOT, PromptBuilder, PromptMessage, UnitVocabulary
from omnispeech.tiny import directory
from omnispeech.tiny.decoder import DecoderShape, with_weight_norm
from omnispeech.tiny.directory import write_tiny
from omnispeech.tiny.shape import LanguageShape, TinyShape

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
PUBLISHED = {  # spec/opens2s.md 2, spec/decoder.md 1
    "OpenS2S/config.json",
    "OpenS2S/model-00001-of-00002.safetensors",
    "OpenS2S/model-00002-of-00002.safetensors",
    "OpenS2S/model.safetensors.index.json",
    "OpenS2S/generation_config.json",
    "OpenS2S/audio/preprocessor_config.json",
    "OpenS2S/tts/generation_config.json",
    *(f"OpenS2S/{name}" for name in TOKENIZER_FILES),
    *(f"OpenS2S/tts/{name}" for name in TOKENIZER_FILES),
    "glm-4-voice-decoder/config.yaml",
    "glm-4-voice-decoder/flow.pt",
    "glm-4-voice-decoder/hift.pt",
}
TEXTS = (
    "Hello, what's 1234?\n\n",
    "héllo 你好 👩‍👧 e\u0301",
    "<think>a</think><|im_end|> b",
    "  x \r\n",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "models"
    write_tiny(path)
    return path


@pytest.fixture(scope="module")
def decoder(models: Path) -> SpeechDecoder:
    return load_decoder(models / "glm-4-voice-decoder", convert=False)


def hashes(root: Path) -> dict[str, str]:
    """Of all that lies in directories: the manifest beside them has times of change."""
    files = (path for path in root.glob("*/**/*") if path.is_file())
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def read(path: Path) -> dict[str, object]:
    value = json.loads(path.read_text())
    assert isinstance(value, dict)
    return value


def tensor_names(directory: Path) -> set[str]:
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    return names


def test_every_published_file_is_there_and_no_other(models: Path) -> None:
    assert set(hashes(models)) == PUBLISHED


def test_it_is_a_few_megabytes(models: Path) -> None:
    assert sum(f.stat().st_size for f in models.rglob("*") if f.is_file()) < 8 << 20


def test_the_same_seed_gives_the_same_bytes_in_another_process(
    models: Path, tmp_path: Path
) -> None:
    code = "import sys, pathlib; from omnispeech.tiny.directory import write_tiny as w; "
    code += "w(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True)
    assert hashes(tmp_path / "again") == hashes(models)


def test_another_seed_gives_other_weights_and_the_same_texts(models: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path, seed=1)
    first, second = hashes(models), hashes(tmp_path)
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {name for name in PUBLISHED if name.endswith((".safetensors", ".pt"))}


def test_what_is_there_already_is_left_alone(models: Path) -> None:
    before = hashes(models)
    with pytest.raises(CheckpointError, match="OpenS2S is there already"):
        write_tiny(models)
    assert hashes(models) == before


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is not a directory"):
        write_tiny(tmp_path / "file")


def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *_: object) -> None:
        (path / "config.yaml").touch()
        raise OSError("the disk is full")

    monkeypatch.setattr(directory, "write_decoder", fail)
    with pytest.raises(OSError, match="disk is full"):
        write_tiny(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_composite_configuration_is_as_published(models: Path) -> None:
    config, golden = (
        read(path / "config.json")
        for path in (models / "OpenS2S", GOLDEN / "opens2s" / "opens2s-tiny")
    )
    assert config.keys() == golden.keys()
    assert "model_type" not in config
    assert (config["interleave_strategy"], config["conv_kernel_sizes"]) == ("4:8", "5,5")


def test_tensors_have_the_published_names_and_are_bfloat16(models: Path) -> None:
    path = models / "OpenS2S"
    assert tensor_names(path) == tensor_names(GOLDEN / "opens2s" / "opens2s-tiny")
    places = read(path / "model.safetensors.index.json")["weight_map"]
    assert isinstance(places, dict)
    for name, file in places.items():
        with safe_open(path / file, "pt") as tensors:
            assert tensors.get_tensor(name).dtype == torch.bfloat16


def test_the_decoder_has_the_published_names_and_is_float32(models: Path) -> None:
    for name in ("flow.pt", "hift.pt"):
        weights = torch.load(models / "glm-4-voice-decoder" / name, weights_only=True)
        golden = torch.load(GOLDEN / "decoder" / name, weights_only=True)
        assert weights.keys() == golden.keys()
        assert {w.dtype for w in weights.values()} == {torch.float32}


def test_weight_norm_splits_what_it_folds() -> None:
    weights = {"ups.0.weight": torch.randn(6, 4, 16), "source_downs.0.weight": torch.ones(2, 3, 4)}
    split = with_weight_norm(weights)
    assert set(split) == {"ups.0.weight_g", "ups.0.weight_v", "source_downs.0.weight"}
    folded = torch._weight_norm(split["ups.0.weight_v"], split["ups.0.weight_g"], 0)
    torch.testing.assert_close(folded, weights["ups.0.weight"])


def test_opens2s_loads_exactly(models: Path) -> None:
    loaded = load_opens2s(models / "OpenS2S", torch.device("cpu"), torch.float32)
    config = loaded.model.config
    assert (config.text_span, config.unit_span) == (4, 8)
    assert loaded.speech_generation.max_new_tokens == 100
    assert config.tts_lm.num_attention_heads * config.tts_lm.head_dim != config.tts_lm.hidden_size


def test_vocabularies_fit_the_embeddings_and_the_decoder(
    models: Path, decoder: SpeechDecoder
) -> None:
    config = load_opens2s(models / "OpenS2S", torch.device("cpu"), torch.float32).model.config
    tokenizer = Tokenizer.from_file(str(models / "OpenS2S" / "tokenizer.json"))
    units = UnitVocabulary.from_directory(models / "OpenS2S" / "tts")
    assert config.llm.vocab_size == tokenizer.get_vocab_size()
    assert config.tts_lm.vocab_size == units.units_bias + units.count
    assert decoder.flow.config.vocab_size == units.count == 512


@pytest.mark.parametrize("folder", ["", "tts"])
def test_transformers_reads_the_tokenizer_files_to_the_same_ids(models: Path, folder: str) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = models / "OpenS2S" / folder
    own = Tokenizer.from_file(str(path / "tokenizer.json"))
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        theirs = kind.from_pretrained(path)
        assert all(theirs(text)["input_ids"] == own.encode(text).ids for text in TEXTS)


def test_words_are_cut_as_qwen_cuts_them(models: Path) -> None:
    stored, golden = (
        json.loads((path / "tokenizer.json").read_text())
        for path in (models / "OpenS2S", GOLDEN / "opens2s" / "opens2s-tiny")
    )
    assert stored["normalizer"] == golden["normalizer"]
    words, _ = stored["pre_tokenizer"]["pretokenizers"]
    assert words == golden["pre_tokenizer"]["pretokenizers"][0]


def test_the_prompt_has_the_published_form(models: Path) -> None:
    builder = PromptBuilder.from_directory(models / "OpenS2S")
    tokenizer = Tokenizer.from_file(str(models / "OpenS2S" / "tokenizer.json"))
    ids = builder.build([PromptMessage("user", (AUDIO,))])
    text = tokenizer.decode([i for i in ids if i != AUDIO_SLOT], skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|im_audio_start|><|im_audio_end|><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n<|im_tts_start|>"
    )


@torch.no_grad()
def test_units_become_an_audible_sound_that_is_not_clipped(decoder: SpeechDecoder) -> None:
    flow, hift = decoder.flow, decoder.hift
    generator = torch.Generator().manual_seed(0)
    units = torch.randint(512, (25,), generator=generator).tolist()
    noise = torch.randn(1, 80, flow.frames(25), generator=generator)
    mel = flow(units, noise, flow.solver())
    pitch = hift.f0_predictor(mel)
    hum = torch.randn(1, 9, hift.config.hop * mel.shape[2], generator=generator)
    samples = hift(mel, hift.m_source(pitch, torch.zeros(1, 9), hum))
    assert -8 < mel.mean() < -2 and mel.std() < 4
    assert 0.5 < (pitch > 10).float().mean() < 1.0 and 40 < pitch.median() < 300
    assert 0.02 < samples.std() < 0.3 and samples.mean().abs() < 0.01
    assert (samples.abs() > 0.98).float().mean() < 0.01


@torch.no_grad()
def test_likely_text_is_words_and_now_and_then_the_end(models: Path) -> None:
    loaded = load_opens2s(models / "OpenS2S", torch.device("cpu"), torch.float32)
    model, builder = loaded.model.llm_model, PromptBuilder.from_directory(models / "OpenS2S")
    ids = builder.build([PromptMessage("user", ("Hello, how are you?",))])
    cache = model.new_cache(len(ids))
    row = cache.allocate(len(ids))
    assert row is not None
    states = model(model.embed(torch.tensor(ids)), cache, cache.layout([(row, len(ids))]))
    likely = model.lm_head(states).softmax(-1)  # [T, V]
    text = builder.decode_text(likely.topk(5).indices.flatten().tolist())
    assert text.isascii() and text.isprintable()
    assert 0.005 < likely[:, loaded.text_generation.eos_ids[0]].mean() < 0.2


def test_a_larger_checkpoint_is_a_matter_of_sizes(tmp_path: Path) -> None:
    shape = TinyShape(
        llm=LanguageShape(hidden=96, inner=200, layers=3, heads=6),
        speech=LanguageShape(hidden=80, inner=100, layers=1),
        decoder=DecoderShape(unet_width=32, vocoder_width=64, encoder_layers=1),
        units=1024,
        shards=3,
    )
    write_tiny(tmp_path, shape=shape)
    loaded = load_opens2s(tmp_path / "OpenS2S", torch.device("cpu"), torch.bfloat16)
    config = loaded.model.config
    assert (config.llm.num_hidden_layers, config.tts_lm.hidden_size) == (3, 80)
    assert len(list((tmp_path / "OpenS2S").glob("model-*.safetensors"))) == 3
    decoder = load_decoder(tmp_path / "glm-4-voice-decoder", convert=False)
    assert decoder.hift.config.base_channels == 64


def test_the_spoken_question_is_short_and_plain() -> None:
    file = Path(__file__).parents[1] / "examples" / "question.wav"
    assert file.stat().st_size < 120_000
    with wave.open(str(file)) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (16_000, 1, 2)
        assert 1.0 < sound.getnframes() / 16_000 < 4.0


def test_both_are_entered_in_the_manifest_as_they_were_written(models: Path) -> None:
    manifest = Manifest(models)
    for name in ("OpenS2S", "glm-4-voice-decoder"):
        manifest.check(name, deep=True)
        assert manifest.entry(name).made == {"by": "omnispeech tiny", "seed": 0}
