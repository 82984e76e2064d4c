import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnispeech.assembly import language_models
from omnispeech.checkpoint.opens2s import (
    GenerationDefaults,
    LoadedOpenS2S,
    load_opens2s,
    read_generation,
)
from omnispeech.checkpoint.shards import Shards
from omnispeech.errors import CheckpointError
from omnispeech.prompt import UnitVocabulary

GOLDEN = Path(__file__).parent / "golden" / "opens2s" / "opens2s-tiny"
CPU = torch.device("cpu")
Q_PROJ = "llm_model.model.layers.0.self_attn.q_proj"
LLM_HEAD, LLM_EMBEDDING = "llm_model.lm_head.weight", "llm_model.model.embed_tokens.weight"
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}


def load(directory: Path, dtype: torch.dtype = torch.float32) -> LoadedOpenS2S:
    return load_opens2s(directory, CPU, dtype)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return load_file(GOLDEN / "model.safetensors")


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def save(directory: Path, weights: dict[str, Tensor]) -> None:
    save_file({n: t.contiguous() for n, t in weights.items()}, directory / "model.safetensors")


def save_sharded(directory: Path, weights: dict[str, Tensor], shards: int) -> None:
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(sorted(weights.items()))[k::shards])
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_equal(loaded: LoadedOpenS2S, expected: dict[str, Tensor]) -> None:
    weights = loaded.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


# whole checkpoints


def test_the_published_layout_loads_every_tensor_as_stored(stored: dict[str, Tensor]) -> None:
    loaded = load(GOLDEN)
    assert_equal(loaded, stored)
    assert not loaded.model.training
    assert (loaded.model.config.text_span, loaded.model.config.unit_span) == (2, 4)
    assert loaded.preprocessor["feature_size"] == 128


def test_weights_are_cast_to_the_precision_asked_for(stored: dict[str, Tensor]) -> None:
    weights = load(GOLDEN, torch.bfloat16).model.state_dict()
    assert all(torch.equal(weights[name], t.bfloat16()) for name, t in stored.items())


def test_the_precision_in_the_files_does_not_matter(
    checkpoint: Path, stored: dict[str, Tensor]
) -> None:
    save(checkpoint, {name: t.bfloat16() for name, t in stored.items()})
    change_json(checkpoint / "config.json", lambda c: c.update(torch_dtype="bfloat16"))
    assert_equal(load(checkpoint), {name: t.bfloat16().float() for name, t in stored.items()})


def test_whole_numbers_keep_their_type(tmp_path: Path) -> None:
    save(tmp_path, {"packed": torch.arange(6, dtype=torch.int32)})
    assert Shards(tmp_path, CPU).read("packed", CPU, torch.bfloat16).dtype == torch.int32


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_load_as_the_single_file_does(
    checkpoint: Path, stored: dict[str, Tensor], shards: int
) -> None:
    save_sharded(checkpoint, stored, shards)
    assert_equal(load(checkpoint), stored)


@pytest.mark.parametrize("kind", [None, "omnispeech"])
def test_a_config_is_read_without_a_model_type_and_with_one(
    checkpoint: Path, stored: dict[str, Tensor], kind: str | None
) -> None:
    """Defect B18: published files have none, so generic loaders can not open them."""
    assert "model_type" not in json.loads((checkpoint / "config.json").read_text())
    change_json(
        checkpoint / "config.json", lambda c: c.update({"model_type": kind} if kind else {})
    )
    assert_equal(load(checkpoint), stored)


def test_keys_with_defaults_may_be_absent(checkpoint: Path, stored: dict[str, Tensor]) -> None:
    def strip(config: dict[str, Any]) -> None:
        for nested in ("audio_encoder_config", "llm_config", "tts_lm_config"):
            for name in ("model_type", "attention_bias", "rms_norm_eps", "scale_embedding"):
                config[nested].pop(name, None)
        for name in ("conv_kernel_sizes", "lora_config", "torch_dtype", "architectures"):
            del config[name]

    change_json(checkpoint / "config.json", strip)
    assert_equal(load(checkpoint), stored)


def test_the_rope_parameters_of_transformers_5_are_understood(checkpoint: Path) -> None:
    def rewrite(config: dict[str, Any]) -> None:
        for lm in ("llm_config", "tts_lm_config"):
            del config[lm]["rope_theta"], config[lm]["rope_scaling"]
            config[lm]["rope_parameters"] = {"rope_theta": 5000.0, "rope_type": "default"}

    change_json(checkpoint / "config.json", rewrite)
    assert load(checkpoint).model.config.llm.rope_theta == 5000.0


# what does not fit


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(
    checkpoint: Path, stored: dict[str, Tensor]
) -> None:
    weights = dict(stored)
    del weights["llm2tts.weight"], weights["llm_ln.bias"]
    weights["extra"] = torch.zeros(2)
    weights["audio_adapter.ln.weight"] = torch.zeros(63)
    save(checkpoint, weights)
    with pytest.raises(CheckpointError) as error:
        load(checkpoint)
    for part in (
        "2 missing: llm2tts.weight, llm_ln.bias",
        "1 unexpected: extra",
        "1 misshapen: audio_adapter.ln.weight [63] instead of [64]",
        str(checkpoint),
    ):
        assert part in str(error.value)


def test_a_misfit_is_found_before_any_tensor_is_read(
    checkpoint: Path, stored: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpoint, stored | {"extra": torch.zeros(2)})
    monkeypatch.setattr(Shards, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match="1 unexpected: extra"):
        load(checkpoint)


def test_a_missing_shard_is_named(checkpoint: Path, stored: dict[str, Tensor]) -> None:
    save_sharded(checkpoint, stored, 3)
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 3 shards: model-00002-of-00003"):
        load(checkpoint)


def test_a_tensor_stored_twice_is_refused(checkpoint: Path, stored: dict[str, Tensor]) -> None:
    save_sharded(checkpoint, stored, 2)
    save_file(stored, checkpoint / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="holds .* a second time"):
        load(checkpoint)


def test_an_index_cannot_name_files_outside_its_directory(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "model.safetensors")
    index = {"weight_map": {"a": "../model.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its directory"):
        load(checkpoint)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0{not json       }"])
def test_a_damaged_header_names_the_file(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load(checkpoint)


def test_a_file_that_was_cut_off_is_damaged(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load(checkpoint)


def test_pickled_weights_are_never_read(checkpoint: Path, stored: dict[str, Tensor]) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save(stored, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights \(\*\.bin\) are never read"):
        load(checkpoint)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        load(tmp_path / "nowhere")


def test_missing_files_are_all_named(checkpoint: Path) -> None:
    missing = ("config.json", "tokenizer.json", "audio/preprocessor_config.json")
    for name in (*missing, "tts/tokenizer.json"):
        (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {', '.join(missing)}, tts/tokenizer.json"):
        load(checkpoint)


@pytest.mark.parametrize("text, message", [("{", "is not valid JSON"), ("[]", "holds list")])
def test_a_broken_config_names_the_file(checkpoint: Path, text: str, message: str) -> None:
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json {message}"):
        load(checkpoint)


@pytest.mark.parametrize(
    "change, message",
    [({"chunk_length": 10}, "1000 mel frames"), ({"feature_size": 80}, "num_mel_bins=128")],
)
def test_features_that_do_not_fit_the_encoder_are_refused(
    checkpoint: Path, change: dict[str, Any], message: str
) -> None:
    change_json(checkpoint / "audio/preprocessor_config.json", lambda p: p.update(change))
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_units_without_a_row_in_the_speech_model_are_refused(checkpoint: Path) -> None:
    units = UnitVocabulary.from_directory(checkpoint / "tts")
    rows = load(checkpoint).model.config.tts_lm.vocab_size
    more = [
        {"content": f"<|audio_{unit}|>", "id": units.to_id(unit)}
        for unit in range(units.count, units.to_unit(rows) + 1)
    ]
    change_json(checkpoint / "tts/tokenizer.json", lambda t: t["added_tokens"].extend(more))
    with pytest.raises(CheckpointError, match=rf"up to id {rows}, .* has {rows} rows"):
        language_models(checkpoint, load(checkpoint))


# heads and embeddings


@pytest.mark.parametrize("lm", ["llm", "tts_lm"])
def test_a_stored_head_is_used_though_the_flag_says_tied(
    checkpoint: Path, stored: dict[str, Tensor], lm: str
) -> None:
    change_json(
        checkpoint / "config.json", lambda c: c[f"{lm}_config"].update(tie_word_embeddings=True)
    )
    assert_equal(load(checkpoint), stored)


@pytest.mark.parametrize("lm", ["llm", "tts_lm"])
def test_an_absent_head_is_the_embedding_where_the_flag_says_tied(
    checkpoint: Path, stored: dict[str, Tensor], lm: str
) -> None:
    save(checkpoint, {n: t for n, t in stored.items() if n != f"{lm}_model.lm_head.weight"})
    change_json(
        checkpoint / "config.json", lambda c: c[f"{lm}_config"].update(tie_word_embeddings=True)
    )
    model = getattr(load(checkpoint).model, f"{lm}_model")
    assert torch.equal(model.lm_head.weight, stored[f"{lm}_model.model.embed_tokens.weight"])
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_an_absent_head_is_missing_where_the_flag_says_untied(
    checkpoint: Path, stored: dict[str, Tensor]
) -> None:
    save(checkpoint, {n: t for n, t in stored.items() if n != LLM_HEAD})
    with pytest.raises(CheckpointError, match=f"1 missing: {LLM_HEAD}"):
        load(checkpoint)


# LoRA


def deeper(name: str) -> str:
    return f"llm_model.model.{rest}" if (rest := name.removeprefix("llm_model.")) != name else name


def unmerged(stored: dict[str, Tensor], *, base_layer: bool) -> dict[str, Tensor]:
    """As peft saves it in training: one more level, and two small matrices."""
    weights = {deeper(name): tensor for name, tensor in stored.items()}
    q_proj = deeper(Q_PROJ)
    if base_layer:
        weights[f"{q_proj}.base_layer.weight"] = weights.pop(f"{q_proj}.weight")
    generator = torch.Generator().manual_seed(0)
    weights[f"{q_proj}.lora_A.default.weight"] = torch.randn(4, 64, generator=generator)
    weights[f"{q_proj}.lora_B.default.weight"] = torch.randn(64, 4, generator=generator)
    return weights


@pytest.mark.parametrize("base_layer", [False, True], ids=["peft 0.5", "newer peft"])
def test_an_unmerged_lora_checkpoint_loads_as_the_merged_one(
    checkpoint: Path, stored: dict[str, Tensor], base_layer: bool
) -> None:
    weights = unmerged(stored, base_layer=base_layer)
    a, b = (weights[f"{deeper(Q_PROJ)}.lora_{side}.default.weight"] for side in "AB")
    save(checkpoint, weights)
    change_json(checkpoint / "config.json", lambda c: c.update(lora_config=LORA))
    merged = stored[f"{Q_PROJ}.weight"] + 6 / 4 * (b @ a)
    assert_equal(load(checkpoint), stored | {f"{Q_PROJ}.weight": merged})


def test_lora_is_merged_in_float32_whatever_the_precisions(
    checkpoint: Path, stored: dict[str, Tensor]
) -> None:
    weights = {n: t.bfloat16() for n, t in unmerged(stored, base_layer=True).items()}
    a, b = (weights[f"{deeper(Q_PROJ)}.lora_{side}.default.weight"].float() for side in "AB")
    save(checkpoint, weights)
    change_json(checkpoint / "config.json", lambda c: c.update(lora_config=LORA))
    merged = stored[f"{Q_PROJ}.weight"].bfloat16().float() + 6 / 4 * (b @ a)
    loaded = load(checkpoint, torch.bfloat16).model.state_dict()[f"{Q_PROJ}.weight"]
    assert torch.equal(loaded, merged.bfloat16())


def test_a_merged_checkpoint_may_still_carry_its_lora_config(
    checkpoint: Path, stored: dict[str, Tensor]
) -> None:
    change_json(checkpoint / "config.json", lambda c: c.update(lora_config=LORA))
    assert_equal(load(checkpoint), stored)


@pytest.mark.parametrize(
    "lora_config, message",
    [
        (None, "its config.json has no lora_config"),
        (LORA | {"r": 8}, "do not fit the weight .* and r=8"),
        (LORA | {"use_rslora": True}, "use_rslora=True, which cannot be merged"),
        ({"r": 4}, "lora_alpha=None; both must be numbers"),
    ],
)
def test_a_lora_that_cannot_be_merged_is_refused(
    checkpoint: Path, stored: dict[str, Tensor], lora_config: dict[str, Any], message: str
) -> None:
    save(checkpoint, unmerged(stored, base_layer=False))
    change_json(checkpoint / "config.json", lambda c: c.update(lora_config=lora_config))
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("part", ["weight", "lora_A.default.weight", "lora_B.default.weight"])
def test_half_a_lora_is_refused(checkpoint: Path, stored: dict[str, Tensor], part: str) -> None:
    weights = unmerged(stored, base_layer=False)
    del weights[f"{deeper(Q_PROJ)}.{part}"]
    save(checkpoint, weights)
    change_json(checkpoint / "config.json", lambda c: c.update(lora_config=LORA))
    with pytest.raises(CheckpointError, match=f"the LoRA of {Q_PROJ}.weight is not whole"):
        load(checkpoint)


# generation defaults


def test_generation_defaults_are_those_of_the_files() -> None:
    loaded = load(GOLDEN)
    assert loaded.text_generation == GenerationDefaults(eos_ids=(572, 570), top_k=20)
    assert loaded.speech_generation == GenerationDefaults(
        eos_ids=(302, 300), top_k=20, max_new_tokens=512
    )


@pytest.mark.parametrize("eos, ids", [(7, (7,)), ([7], (7,)), ([7, 9], (7, 9))])
def test_the_end_id_may_be_a_number_or_a_list(
    tmp_path: Path, eos: int | list[int], ids: tuple[int, ...]
) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": eos}))
    assert read_generation(path, {"eos_token_id": 1}).eos_ids == ids


def test_absent_settings_mean_the_defaults_of_the_original(checkpoint: Path) -> None:
    (checkpoint / "tts/generation_config.json").write_text('{"eos_token_id": 302}')
    assert load(checkpoint).speech_generation == GenerationDefaults(
        eos_ids=(302,), top_k=50, max_new_tokens=512
    )


def test_a_null_top_k_is_off_and_a_stored_limit_counts(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": 3, "top_k": null, "max_new_tokens": 40}')
    assert read_generation(path, {}, limit=512) == GenerationDefaults(
        eos_ids=(3,), top_k=0, max_new_tokens=40
    )


def test_without_generation_files_the_end_ids_are_those_of_the_nested_configs(
    checkpoint: Path,
) -> None:
    for folder in (checkpoint, checkpoint / "tts"):
        (folder / "generation_config.json").unlink()
    loaded = load(checkpoint)
    assert loaded.text_generation == GenerationDefaults(eos_ids=(572,))
    assert loaded.speech_generation == GenerationDefaults(eos_ids=(302,), max_new_tokens=512)


def test_a_checkpoint_that_names_no_end_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no eos_token_id in .*nothing would end a reply"):
        read_generation(tmp_path / "generation_config.json", {"vocab_size": 9})


@pytest.mark.parametrize("end", [582, -1, [302, 900], "302"])
def test_an_end_id_that_the_model_does_not_know_is_refused(checkpoint: Path, end: object) -> None:
    change_json(checkpoint / "tts/generation_config.json", lambda g: g.update(eos_token_id=end))
    wrong = repr(end[-1] if isinstance(end, list) else end)
    with pytest.raises(CheckpointError) as error:
        load(checkpoint)
    assert f"end id {wrong} of {checkpoint}/tts/generation_config.json" in str(error.value)
    assert "allowed: 0 to 581" in str(error.value)
