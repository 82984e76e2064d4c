"""One language model on disk, as the quantizer reads it: inside OpenS2S, or by itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnispeech.checkpoint.language import EMBEDDING, HEAD, LanguageFiles, PartName
from omnispeech.errors import CheckpointError
from omnispeech.models.qwen3 import Block, CausalLM, Qwen3Config
from omnispeech.models.speech_lm import SpeechLM
from omnispeech.tiny.directory import write_tiny

CPU = torch.device("cpu")
PARTS: tuple[PartName, ...] = ("llm", "speech_lm")
PREFIXES = {"llm": "llm_model.", "speech_lm": "tts_lm_model."}
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def opens2s(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    write_tiny(directory)
    return directory / "OpenS2S"


@pytest.fixture
def changeable(opens2s: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(opens2s, tmp_path / "OpenS2S"))


def stored(directory: Path) -> dict[str, Tensor]:
    return {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}


def save(directory: Path, weights: dict[str, Tensor]) -> None:
    for file in directory.glob("model*"):
        file.unlink()
    save_file(weights, directory / "model.safetensors")


def change_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def plain_model(directory: Path, kind: str, **changes: Any) -> Any:
    """A Hugging Face directory, written by transformers itself."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(directory)
    return model


def names(files: LanguageFiles) -> list[str]:
    layers = range(files.config.num_hidden_layers)
    return files.outside_names() + [name for i in layers for name in files.layer_names(i)]


def weights(files: LanguageFiles) -> dict[str, Tensor]:
    found = {name: files.read(name, torch.float32) for name in names(files)}
    return found | ({HEAD: found[EMBEDDING]} if files.tied else {})


def states(model: CausalLM, ids: Tensor) -> Tensor:
    cache = model.new_cache(len(ids))
    row = cache.allocate(len(ids))
    assert row is not None
    return model(model.embed(ids), cache, cache.layout([(row, len(ids))]))


def loaded(files: LanguageFiles, model: CausalLM) -> CausalLM:
    model.load_state_dict(weights(files))
    return model.eval()


# a part of OpenS2S


@pytest.mark.parametrize("part", PARTS)
def test_every_tensor_of_the_part_and_no_other_is_there(opens2s: Path, part: PartName) -> None:
    files = LanguageFiles.open(opens2s, part)
    expected = {n: t for n, t in stored(opens2s).items() if n.startswith(PREFIXES[part])}
    assert {PREFIXES[part] + name for name in names(files)} == expected.keys()
    for name in names(files):
        assert torch.equal(files.read(name, torch.bfloat16), expected[PREFIXES[part] + name])
        assert files.shape(name) == tuple(expected[PREFIXES[part] + name].shape)
        assert files.dtype(name) == files.stored_dtype == torch.bfloat16


@pytest.mark.parametrize("part", PARTS)
@torch.inference_mode()
def test_transformers_runs_the_part_from_what_we_read(opens2s: Path, part: PartName) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    files = LanguageFiles.open(opens2s, part)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**files.raw)).float().eval()
    known = {n: t for n, t in weights(files).items() if not n.startswith("spk")}
    theirs.load_state_dict(known)
    ours = loaded(files, (SpeechLM if part == "speech_lm" else CausalLM)(files.config))
    ids = torch.arange(30) * 7 % files.config.vocab_size
    expected = theirs(ids[None], output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(states(ours, ids), expected, atol=1e-5, rtol=1e-5)


def test_the_config_of_a_part_leaves_nothing_to_defaults(changeable: Path) -> None:
    """The published nested configs are differences to class defaults of one version."""

    def strip(raw: dict[str, Any]) -> None:
        for name in ("model_type", "rope_theta", "rms_norm_eps", "max_position_embeddings"):
            del raw["llm_config"][name]
        raw["llm_config"] |= {"_attn_implementation_autoset": True, "torch_dtype": None}

    change_config(changeable, strip)
    raw = LanguageFiles.open(changeable, "llm").raw
    expected = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "head_dim": 32,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    assert {name: raw[name] for name in expected} == expected
    assert not [name for name in raw if name.startswith("_")]


@pytest.mark.parametrize("part", PARTS)
@torch.inference_mode()
def test_blocks_are_the_layers_of_the_model(opens2s: Path, part: PartName) -> None:
    files = LanguageFiles.open(opens2s, part)
    model = (SpeechLM if part == "speech_lm" else CausalLM)(files.config)
    whole = loaded(files, model).model.layers[1].state_dict()
    block = files.block(1, CPU)
    assert isinstance(block, Block)
    assert block.state_dict().keys() == whole.keys()
    assert all(torch.equal(block.state_dict()[name], whole[name]) for name in whole)
    assert not block.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in block.parameters())


def test_a_layer_is_read_and_nothing_else(opens2s: Path) -> None:
    files = LanguageFiles.open(opens2s, "llm")
    assert files.bytes_read == 0
    files.block(0, CPU)
    layer = f"llm_model.{Q_PROJ}".removesuffix("self_attn.q_proj")
    size = sum(t.nbytes for name, t in stored(opens2s).items() if name.startswith(layer))
    assert files.bytes_read == size


def test_embedding_reads_the_rows_asked_for(opens2s: Path) -> None:
    files = LanguageFiles.open(opens2s, "llm")
    ids = torch.tensor([5, 2, 5, 6])
    rows = files.embed(ids)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, stored(opens2s)[f"llm_model.{EMBEDDING}"][ids].float())
    assert files.bytes_read == 3 * files.config.hidden_size * 2


def test_tokenizer_files_are_those_of_the_part(opens2s: Path, changeable: Path) -> None:
    for name in ("modeling_opens2s.py", "chat_template.jinja", "tokenizer.model"):
        (changeable / name).touch()
    text = LanguageFiles.open(changeable, "llm").tokenizer_files()
    speech = LanguageFiles.open(changeable, "speech_lm").tokenizer_files()
    assert {path.parent for path in text} == {changeable}
    assert {path.parent for path in speech} == {changeable / "tts"}
    expected = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json"}
    expected |= {"merges.txt", "special_tokens_map.json", "added_tokens.json"}
    assert {path.name for path in speech} == expected
    assert {path.name for path in text} == expected | {"chat_template.jinja", "tokenizer.model"}


# LoRA


def with_lora(directory: Path, alpha: int) -> tuple[Tensor, Tensor]:
    """As peft saves it in training: the LLM one level deeper, and two small matrices."""
    found = {
        name.replace("llm_model.", "llm_model.model."): t for name, t in stored(directory).items()
    }
    q_proj = f"llm_model.model.{Q_PROJ}"
    n, k = found[f"{q_proj}.weight"].shape
    a, b = torch.randn(4, k), torch.randn(n, 4)
    found |= {f"{q_proj}.lora_A.default.weight": a, f"{q_proj}.lora_B.default.weight": b}
    save(directory, found)
    change_config(directory, lambda c: c.update(lora_config={"r": 4, "lora_alpha": alpha}))
    return a, b


def test_a_lora_is_merged_into_its_layer(opens2s: Path, changeable: Path) -> None:
    a, b = with_lora(changeable, 8)
    files = LanguageFiles.open(changeable, "llm")
    base = stored(opens2s)[f"llm_model.{Q_PROJ}.weight"].float()
    merged = files.block(0, CPU).self_attn.q_proj.weight
    torch.testing.assert_close(merged, base + 2 * b @ a)
    assert names(files) == names(LanguageFiles.open(opens2s, "llm"))


# plain directories


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3", {"head_dim": 16}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_theta": 100.0, **LLAMA3}}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None}),
    ],
)
@torch.inference_mode()
def test_a_plain_directory_is_read_as_transformers_wrote_it(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = plain_model(tmp_path, kind, **changes)
    files = LanguageFiles.open(tmp_path)
    assert files.tied == changes.get("tie_word_embeddings", False) == (HEAD not in names(files))
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**files.raw)).float().eval()
    again.load_state_dict(weights(files))
    ids = torch.arange(40) * 7 % 101
    expected = theirs(ids[None], output_hidden_states=True).hidden_states[-1][0]
    found = again(ids[None], output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ours = states(loaded(files, CausalLM(files.config)), ids)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_both_spellings_of_the_rotation_give_one_config(tmp_path: Path) -> None:
    plain_model(tmp_path, "llama", rope_parameters={"rope_theta": 100.0, **LLAMA3})
    files = LanguageFiles.open(tmp_path)
    assert files.raw["rope_theta"] == 100.0
    assert files.raw["rope_scaling"] == LLAMA3
    assert "rope_parameters" not in files.raw
    assert Qwen3Config.from_dict(files.raw) == files.config


def test_code_of_a_plain_model_goes_with_it(tmp_path: Path) -> None:
    plain_model(tmp_path, "llama")
    (tmp_path / "modeling_own.py").touch()
    assert tmp_path / "modeling_own.py" in LanguageFiles.open(tmp_path).tokenizer_files()


def test_frequencies_that_old_files_store_are_passed_over(tmp_path: Path) -> None:
    plain_model(tmp_path, "llama")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save(tmp_path, stored(tmp_path) | extra)
    assert not [n for n in names(LanguageFiles.open(tmp_path)) if "rotary" in n]


# heads


def test_a_stored_head_is_not_tied_whatever_the_flag_says(changeable: Path) -> None:
    change_config(changeable, lambda c: c["llm_config"].update(tie_word_embeddings=True))
    files = LanguageFiles.open(changeable, "llm")
    assert (files.tied, files.raw["tie_word_embeddings"]) == (False, False)


def test_an_absent_head_is_tied_only_where_the_flag_says_so(changeable: Path) -> None:
    save(changeable, {n: t for n, t in stored(changeable).items() if n != f"llm_model.{HEAD}"})
    with pytest.raises(CheckpointError, match=f"1 missing: {HEAD}"):
        LanguageFiles.open(changeable, "llm")
    change_config(changeable, lambda c: c["llm_config"].update(tie_word_embeddings=True))
    files = LanguageFiles.open(changeable, "llm")
    assert (files.tied, files.raw["tie_word_embeddings"]) == (True, True)
    assert HEAD not in files.outside_names()


# refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"llm_model.{Q_PROJ}.weight"), f"1 missing: {Q_PROJ}.weight"),
        (
            lambda w: w.update({f"llm_model.{Q_PROJ}.bias": torch.ones(3)}),
            f"1 unexpected: {Q_PROJ}.bias",
        ),
        (
            lambda w: w.update({f"llm_model.{EMBEDDING}": torch.ones(3, 3)}),
            rf"1 misshapen: {EMBEDDING} \[3, 3\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_found_when_it_is_opened(
    changeable: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    found = stored(changeable)
    change(found)
    save(changeable, found)
    with pytest.raises(CheckpointError, match=message):
        LanguageFiles.open(changeable, "llm")
    LanguageFiles.open(changeable, "speech_lm")


def test_the_part_must_be_named_where_there_are_parts(opens2s: Path, tmp_path: Path) -> None:
    plain_model(tmp_path, "llama")
    with pytest.raises(CheckpointError, match="holds an OpenS2S model: part None; allowed: 'llm'"):
        LanguageFiles.open(opens2s)
    with pytest.raises(CheckpointError, match="holds one text model: part 'llm'; allowed: none"):
        LanguageFiles.open(tmp_path, "llm")


@pytest.mark.parametrize("key", ["quantization_config", "omnispeech_quantization"])
def test_what_is_quantized_already_is_refused(changeable: Path, key: str) -> None:
    change_config(changeable, lambda c: c.update({key: {"bits": 4}}))
    with pytest.raises(CheckpointError, match="is quantized already"):
        LanguageFiles.open(changeable, "llm")


def test_a_missing_directory_or_tensor_is_named(opens2s: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        LanguageFiles.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no tensor llm_model\.spk2tts\.weight"):
        LanguageFiles.open(opens2s, "llm").read("spk2tts.weight", torch.float32)


# fingerprints


def test_a_copy_has_the_same_fingerprint(opens2s: Path, changeable: Path) -> None:
    first = LanguageFiles.open(opens2s, "llm").fingerprint()
    assert LanguageFiles.open(changeable, "llm").fingerprint() == first
    assert LanguageFiles.open(changeable, "speech_lm").fingerprint() != first


def change_one_weight(directory: Path, part: PartName = "llm") -> None:
    found = stored(directory)
    found[f"{PREFIXES[part]}{Q_PROJ}.weight"][0, 0] += 1
    save(directory, found)


def test_the_fingerprint_is_of_one_part(changeable: Path) -> None:
    save(changeable, stored(changeable))
    before = LanguageFiles.open(changeable, "llm").fingerprint()
    change_one_weight(changeable, "speech_lm")
    assert LanguageFiles.open(changeable, "llm").fingerprint() == before


@pytest.mark.parametrize(
    "change",
    [
        change_one_weight,
        lambda d: change_config(d, lambda c: c["llm_config"].update(rope_theta=5e5)),
        lambda d: change_config(d, lambda c: c.update(lora_config={"r": 4, "lora_alpha": 16})),
    ],
    ids=["weight", "config", "lora"],
)
def test_another_model_has_another_fingerprint(
    changeable: Path, change: Callable[[Path], object]
) -> None:
    save(changeable, stored(changeable))
    before = LanguageFiles.open(changeable, "llm").fingerprint()
    change(changeable)
    assert LanguageFiles.open(changeable, "llm").fingerprint() != before
