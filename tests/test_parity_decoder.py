import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnispeech.errors import CheckpointError
from omnispeech.parity.decoder import compare
from omnispeech.parity.report import Row, print_report

GOLDEN = Path(__file__).parent / "golden" / "decoder"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(compare(GOLDEN))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A golden directory with one offline run and one stream of one block."""
    for name in ("config.yaml", "flow.pt", "hift.pt", "inputs.safetensors"):
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    shutil.copyfile(GOLDEN / "offline_10.safetensors", tmp_path / "offline_10.safetensors")
    block = {
        "block": 0, "tokens": 10, "prompt_tokens": 0, "prompt_frames": 0, "total_frames": 68,
        "flow_out": 68, "hift_in": 68, "returned_mel": 68, "samples": 17408, "finalize": True,
    }  # fmt: skip
    (tmp_path / "meta.json").write_text(json.dumps({"dtype": "f32", "stream10_10": [block]}))
    return tmp_path


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(GOLDEN, tmp_path / "set")
    return tmp_path / "set"


def failures(directory: Path) -> list[str]:
    return [f"{row.case} {row.stage}" for row in compare(directory) if not row.passed]


def change(path: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_decoder_computes_what_the_original_did_at_every_stage(rows: list[Row]) -> None:
    assert [row for row in rows if not row.passed] == []


def test_every_stored_tensor_and_every_block_is_compared(rows: list[Row]) -> None:
    compared = {(row.case, row.stage) for row in rows}
    for path in GOLDEN.glob("*.safetensors"):
        if path.stem not in ("inputs", "flow", "hift"):
            assert {(path.stem, name) for name in load_file(path)} <= compared
    meta = json.loads((GOLDEN / "meta.json").read_text())
    streams = {name: blocks for name, blocks in meta.items() if name.startswith("stream")}
    for name, blocks in streams.items():
        assert {(name, f"block{k}.lengths") for k in range(len(blocks))} <= compared


def test_sound_is_compared_with_the_stored_source_as_well(rows: list[Row]) -> None:
    found = {row.stage: row for row in rows if row.case == "offline_10"}
    assert found["wav of stored source"].tolerance == 1e-5
    assert (found["wav"].tolerance, found["wav rms"].tolerance) == (1e-2, 1e-3)


def test_comparison_writes_nothing_into_the_directory(small: Path) -> None:
    before = sorted(small.iterdir())
    assert failures(small) == []
    assert sorted(small.iterdir()) == before


def test_stored_tensor_of_unknown_name_fails(small: Path) -> None:
    change(small / "offline_10.safetensors", lambda t: t.update(est_sideways0=torch.zeros(1)))
    assert failures(small) == ["offline_10 est_sideways0"]


def test_stage_that_the_network_does_not_have_fails(small: Path) -> None:
    change(small / "offline_10.safetensors", lambda t: t.update(enc_layer_2=t["enc_layer_1"] + 0))
    assert failures(small) == ["offline_10 enc_layer_2"]


@pytest.mark.parametrize("value", [math.nan, 1.0])
def test_wrong_number_fails(small: Path, value: float) -> None:
    change(small / "offline_10.safetensors", lambda t: t["mu"][0, 3].fill_(value))
    assert failures(small) == ["offline_10 mu"]


def test_wrong_shape_fails(small: Path) -> None:
    change(small / "offline_10.safetensors", lambda t: t.update(mel=t["mel"][:, :, 1:].clone()))
    assert "offline_10 mel" in failures(small)


def test_wrong_length_fails(small: Path) -> None:
    text = (small / "meta.json").read_text().replace('"flow_out": 68', '"flow_out": 67')
    (small / "meta.json").write_text(text)
    assert failures(small) == ["stream10_10 block0.lengths"]


@pytest.mark.parametrize("name", ["surprise", "stream7_10", "offline_9"])
def test_file_that_cannot_be_compared_fails(small: Path, name: str) -> None:
    save_file({"mel": torch.zeros(1)}, small / f"{name}.safetensors")
    assert failures(small) == [f"{name} mel", f"{name} lengths"]


def test_other_weights_than_the_golden_ones_fail(small: Path) -> None:
    weights = torch.load(small / "flow.pt", weights_only=True)
    weights["decoder.estimator.final_proj.bias"] += 0.01
    torch.save(weights, small / "flow.pt")
    assert {"offline_10 mel", "offline_10 cfm_v_cond_step0"} <= set(failures(small))


def test_directory_without_golden_numbers_is_named(tmp_path: Path) -> None:
    for name in ("config.yaml", "flow.pt", "hift.pt"):
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"inputs\.safetensors does not exist"):
        list(compare(tmp_path))


@pytest.mark.parametrize(
    ("difference", "tolerance", "passed"),
    [(0.0, 0.0, True), (1e-9, 0.0, False), (math.nan, 1.0, False), (math.inf, 1.0, False)],
)
def test_row_passes_within_its_tolerance_only(
    difference: float, tolerance: float, passed: bool
) -> None:
    assert Row("case", "stage", difference, tolerance).passed == passed


def test_report_shows_each_row_and_tells_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_report([Row("offline_10", "mel", 5e-6, 1e-4)]) == 0
    out = capsys.readouterr().out
    assert "offline_10" in out and "5.00e-06" in out and "1 compared, 0 failed" in out


@pytest.mark.parametrize("rows", [[], [Row("a", "b", 0.0, 0.0), Row("a", "c", math.nan, 1.0)]])
def test_report_of_a_failure_or_of_nothing_exits_with_one(
    rows: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    assert print_report(rows) == 1
    assert ("FAILED" in capsys.readouterr().out) == bool(rows)


def change_meta(golden: Path, **changes: object) -> None:
    path = golden / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_facts_in_the_meta_file_that_are_no_lengths_change_nothing(golden: Path) -> None:
    blocks = json.loads((golden / "meta.json").read_text())["stream24_57"]
    change_meta(
        golden, stream_note="made on a Monday", stream24_57=[b | {"seconds": 1.5} for b in blocks]
    )
    assert [row for row in compare(golden) if not row.passed] == []


def test_a_stored_tensor_that_was_cut_at_any_place_fails(golden: Path) -> None:
    path = golden / "offline_10.safetensors"
    stored = load_file(path)
    save_file(stored | {"source": stored["source"][..., :-1].contiguous()}, path)
    assert [row.stage for row in compare(golden) if not row.passed] == ["source"]


@pytest.mark.parametrize("name", ["inputs.safetensors", "offline_10.safetensors", "flow.pt"])
def test_a_file_that_was_cut_short_is_named(golden: Path, name: str) -> None:
    (golden / name).write_bytes((golden / name).read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=re.escape(name)):
        list(compare(golden))
