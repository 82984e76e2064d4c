import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantization_runs import crashing
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.opens2s import load_opens2s
from omnispeech.checkpoint.shards import Shards
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.layers.linear import QuantizedLinear
from omnispeech.layers.packing import unpack
from omnispeech.quantization import whole_model
from omnispeech.quantization.state import give_name
from omnispeech.quantization.whole_model import (
    KEY,
    SCHEME,
    WholeModel,
    make_whole_model,
    quantize_rows,
)

GOLDEN = Path(__file__).parent / "golden" / "opens2s" / "opens2s-tiny"
CPU = torch.device("cpu")
Q_PROJ = "llm_model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN, tmp_path / "models" / "OpenS2S")
    return tmp_path / "models"


def make(models: Path, *, overwrite: bool = False) -> WholeModel:
    return make_whole_model(
        models / "OpenS2S", models / "OpenS2S-8bit", lambda *_: None, overwrite=overwrite
    )


def stored(directory: Path) -> dict[str, Tensor]:
    files = Shards(directory, CPU)
    return {name: files.read(name, CPU, files.dtype(name)) for name in files.names}


def change(directory: Path, name: str, value: Tensor) -> None:
    weights = load_file(directory / "model.safetensors") | {name: value}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def linear(tensors: dict[str, Tensor], module: str) -> Tensor:
    parts = {suffix: tensors[f"{module}.{suffix}"] for suffix in ("qweight", "scales")}
    return unpack(parts, SCHEME).dequantize()


# what is in the directory


def test_only_linears_of_decoder_layers_become_whole_numbers(models: Path) -> None:
    made = make(models)
    before, after = stored(GOLDEN), stored(models / "OpenS2S-8bit")
    codes = {name.removesuffix(".qweight") for name in after if name.endswith(".qweight")}
    assert made.quantized == len(codes)
    assert codes == {
        name.removesuffix(".weight")
        for name in before
        if ".model.layers." in name and name.endswith("_proj.weight")
    }
    assert {name.split(".")[0] for name in codes} == {"llm_model", "tts_lm_model"}
    assert all(after[f"{module}.qweight"].dtype == torch.int8 for module in codes)
    rest = before.keys() - {f"{module}.weight" for module in codes}
    assert all(torch.equal(after[name], before[name]) for name in rest)
    assert len(after) == len(rest) + 2 * len(codes)


def test_no_weight_is_more_than_half_a_step_away(models: Path) -> None:
    made = make(models)
    before, after = stored(GOLDEN), stored(models / "OpenS2S-8bit")
    scales = after[f"{Q_PROJ}.scales"].float()
    apart = (linear(after, Q_PROJ) - before[f"{Q_PROJ}.weight"].float()).abs() / scales
    assert apart.max() <= 0.5001
    assert 0.4 < made.error <= 0.5001


def test_the_original_can_be_deleted(models: Path) -> None:
    """Every file that is no weight is there with its bytes; nothing points to the original."""
    make(models)
    shutil.rmtree(models / "OpenS2S")
    copy = models / "OpenS2S-8bit"
    for path in GOLDEN.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors" and path.name != "config.json":
            assert (copy / path.relative_to(GOLDEN)).read_bytes() == path.read_bytes()
    assert not [path for path in copy.rglob("*") if path.is_symlink()]
    config = json.loads((copy / "config.json").read_text())
    assert config.pop(KEY) == {"layout": "int8", "bits": 8, "group_size": -1}
    assert config == json.loads((GOLDEN / "config.json").read_text()) | {"lora_config": None}
    Manifest(models).check("OpenS2S-8bit", deep=True)


def test_it_is_loaded_when_the_original_is_gone(models: Path) -> None:
    make(models)
    shutil.rmtree(models / "OpenS2S")
    loaded = load_opens2s(models / "OpenS2S-8bit", CPU, torch.float32).model
    layer = loaded.get_submodule(Q_PROJ)
    assert isinstance(layer, QuantizedLinear)
    expected = linear(stored(models / "OpenS2S-8bit"), Q_PROJ)
    torch.testing.assert_close(layer.dequantize().float(), expected)


def test_sizes_are_those_of_the_files(models: Path) -> None:
    made = make(models)
    files = [path for path in (models / "OpenS2S-8bit").rglob("*") if path.is_file()]
    assert made.size == sum(path.stat().st_size for path in files)
    originals = [path for path in (models / "OpenS2S").rglob("*") if path.is_file()]
    assert made.source_size == sum(path.stat().st_size for path in originals)
    after = stored(models / "OpenS2S-8bit")
    parts = [t for n, t in after.items() if f"{n.rpartition('.')[0]}.qweight" in after]
    assert made.codes == sum(tensor.nbytes for tensor in parts)


def test_large_models_are_cut_into_files(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stored_after(models)
    monkeypatch.setattr(whole_model, "SHARD_SIZE", 100_000)
    make(models, overwrite=True)
    assert len(list((models / "OpenS2S-8bit").glob("model-*-of-*.safetensors"))) > 3
    again = stored(models / "OpenS2S-8bit")
    assert all(torch.equal(again[name], whole[name]) for name in whole | again)


def stored_after(models: Path) -> dict[str, Tensor]:
    make(models)
    return stored(models / "OpenS2S-8bit")


def test_lora_is_merged(models: Path) -> None:
    directory = models / "OpenS2S"
    weight = stored(GOLDEN)[f"{Q_PROJ}.weight"]
    a, b = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    lora = {f"{Q_PROJ}.lora_A.default.weight": a, f"{Q_PROJ}.lora_B.default.weight": b}
    weights = load_file(directory / "model.safetensors") | lora
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["lora_config"] = {"r": 2, "lora_alpha": 4}
    (directory / "config.json").write_text(json.dumps(config))
    after = stored_after(models)
    assert not [name for name in after if "lora" in name]
    scales = after[f"{Q_PROJ}.scales"].float()
    merged = weight.float() + 2 * (b @ a)
    assert ((linear(after, Q_PROJ) - merged).abs() / scales).max() < 0.51


# rounding of a row


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3, 1.0, 300.0, 1e6])
def test_rows_of_any_size_keep_half_a_step(size: float) -> None:
    """Where float16 has few digits left for the scale, too."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * size
    rounded = quantize_rows(weight, "x")
    apart = (rounded.dequantize() - weight).abs() / rounded.scales.float()
    assert apart.max() <= 0.5001


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 8)
    weight[1, 3] = 1.0
    assert torch.equal(quantize_rows(weight, "x").dequantize()[0], torch.zeros(8))


def test_a_weight_that_is_not_finite_is_named(models: Path) -> None:
    weight = stored(GOLDEN)[f"{Q_PROJ}.weight"].clone()
    weight[5, 0] = torch.nan
    change(models / "OpenS2S", f"{Q_PROJ}.weight", weight)
    with pytest.raises(CheckpointError, match=rf"row 5 of {Q_PROJ}\.weight is not finite"):
        make(models)
    assert not (models / "OpenS2S-8bit").exists()


def test_a_weight_that_float16_cannot_scale_is_named() -> None:
    with pytest.raises(CheckpointError, match="q_proj.weight reaches 1e"):
        quantize_rows(torch.full((1, 8), 1e7), "q_proj")


# whole or not there


def test_an_interrupted_run_leaves_nothing_under_the_name_and_can_be_repeated(
    models: Path,
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_whole_model(models / "OpenS2S", models / "OpenS2S-8bit", interrupt)
    assert not (models / "OpenS2S-8bit").exists()
    make(models)
    left = {path.name for path in models.iterdir() if not path.name.startswith(".")}
    assert left == {"OpenS2S", "OpenS2S-8bit", "omnispeech-manifest.json"}


def test_a_tensor_that_comes_back_wrong_is_found(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = "llm_model.model.norm.weight"

    def flip(directory: Path, name: str, offset: int) -> None:
        files = Shards(directory, CPU)
        (file,) = (f for f in files.files if name in f.entries)
        with file.path.open("r+b") as raw:
            raw.seek(file.entries[name].start + offset)
            byte = raw.read(1)
            raw.seek(-1, os.SEEK_CUR)
            raw.write(bytes([byte[0] ^ 0x40]))

    real = whole_model.write_shards
    for name, words in ((norm, "not what was read"), (f"{Q_PROJ}.qweight", "steps from")):

        def damaged(directory: Path, pieces: list, size: int, name: str = name) -> None:
            real(directory, pieces, size)
            flip(directory, name, 7)

        monkeypatch.setattr(whole_model, "write_shards", damaged)
        with pytest.raises(CheckpointError, match=words):
            make(models)
        assert not (models / "OpenS2S-8bit").exists()


def test_an_older_model_is_replaced_only_when_asked_and_only_by_a_whole_one(models: Path) -> None:
    make(models)
    (models / "OpenS2S-8bit" / "mark").touch()
    with pytest.raises(ConfigError, match="--overwrite"):
        make(models)
    weight = stored(GOLDEN)[f"{Q_PROJ}.weight"]
    change(models / "OpenS2S", f"{Q_PROJ}.weight", torch.full_like(weight, torch.inf))
    with pytest.raises(CheckpointError):
        make(models, overwrite=True)
    assert (models / "OpenS2S-8bit" / "mark").exists()
    change(models / "OpenS2S", f"{Q_PROJ}.weight", weight)
    make(models, overwrite=True)
    assert not (models / "OpenS2S-8bit" / "mark").exists()


def test_an_older_model_is_never_lost_between_two_names(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(models)
    (models / "OpenS2S-8bit" / "mark").touch()
    with monkeypatch.context() as patch:
        patch.setattr(whole_model, "give_name", stopped_between)
        with pytest.raises(KeyboardInterrupt):
            make(models, overwrite=True)
    assert not (models / "OpenS2S-8bit").exists()
    with pytest.raises(ConfigError, match="--overwrite"):
        make(models)
    assert (models / "OpenS2S-8bit" / "mark").exists()


def stopped_between(result: Path, output: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", crashing(os.rename, 0, before=False))
        give_name(result, output)


def test_a_manifest_that_cannot_be_read_is_told_before_the_work(models: Path) -> None:
    (models / "omnispeech-manifest.json").write_text("{garbled")
    with pytest.raises(CheckpointError, match="omnispeech verify"):
        make(models)
    assert {path.name for path in models.iterdir()} == {"OpenS2S", "omnispeech-manifest.json"}


def test_a_disk_without_room_is_found_before_the_work(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(models)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="left; make room"):
        make(models)


def test_a_directory_of_another_kind_is_refused(models: Path) -> None:
    directory = models / "OpenS2S"
    save_file({"x": torch.zeros(2)}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="no decoder layers"):
        make(models)


def test_an_8_bit_model_is_no_original(models: Path) -> None:
    make(models)
    with pytest.raises(CheckpointError, match="in 8 bits already"):
        make_whole_model(models / "OpenS2S-8bit", models / "again", lambda *_: None)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A file of 200 MB passes through a process that grows by less than half of that."""
    code = """
import json, resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from omnispeech.quantization.whole_model import make_whole_model
root = Path(sys.argv[1]) / "OpenS2S"
root.mkdir()
for shard in range(10):
    save_file({f"llm_model.model.layers.{10 * shard + i}.mlp.up_proj.weight":
               torch.randn(1000, 1000, dtype=torch.bfloat16) for i in range(10)},
              root / f"model-{shard}.safetensors")
names = {f"llm_model.model.layers.{n}.mlp.up_proj.weight": f"model-{n // 10}.safetensors"
         for n in range(100)}
(root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
(root / "config.json").write_text("{}")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
make_whole_model(root, root.parent / "OpenS2S-8bit", lambda *_: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < 100_000  # kB
