"""What is found out before any work: shapes, targets, memory, disk, and what stays float."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from language_model_files import METHOD, language_model
from quantization_runs import quantize

from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.quantization import plan as plan_module
from omnispeech.quantization.memory import available_memory
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.plan import Plan, Work, make_plan, plan_conversion
from omnispeech.quantization.run_settings import RunSettings, parse_layers, parse_size
from omnispeech.quantization.selection import LINEARS, kept_modules, kept_text, layer_linears

HERE = Path(__file__).parent
WORK = Work(tokens=1000, longest=200)


@pytest.fixture
def source(tmp_path: Path) -> LanguageFiles:
    return language_model(tmp_path / "model", num_hidden_layers=2)


def plan(source: LanguageFiles, method: MethodSettings = METHOD, **settings: Any) -> Plan:
    output = source.directory.parent / "out"
    return make_plan(source, WORK, method, RunSettings(**settings), output)


def test_the_result_is_as_large_as_planned(source: LanguageFiles) -> None:
    planned = plan(source)
    report = quantize(source, source.directory.parent / "out")
    assert report.sizes == (planned.float_size, planned.result_size)


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gptq"])
def test_groups_must_divide_the_columns(layout: str, source: LanguageFiles) -> None:
    method = MethodSettings(method="rtn", group_size=128, zero_point=False)
    with pytest.raises(ConfigError, match=r"64 input columns .* 128 .*q_proj and 11 more"):
        plan(source, method, layout=layout)


def test_linears_that_stay_float_need_no_shape(source: LanguageFiles) -> None:
    assert len(plan(source, keep_fp_layers=(0,)).conversion.kept) == 7
    with pytest.raises(ConfigError, match="all 2 layers are kept in float16"):
        plan(source, keep_fp_layers=(0, 1))


def test_a_group_that_does_not_go_is_refused_with_those_that_do(source: LanguageFiles) -> None:
    with pytest.raises(ConfigError, match="group sizes that go: 32, 64, -1"):
        plan(source, MethodSettings(method="rtn", group_size=128))


@pytest.mark.parametrize("target", ["vllm", "sglang", "transformers-marlin"])
def test_servers_on_marlin_take_no_group_of_256(target: str, tmp_path: Path) -> None:
    source = marlin_model(tmp_path)
    with pytest.raises(ConfigError, match="group sizes -1, 32, 64, 128, not 256.*target torch"):
        plan(source, MethodSettings(group_size=256), target=target)
    assert plan(source, MethodSettings(group_size=256)).conversion.scheme.group_size == 256
    for size in (-1, 32, 64, 128):
        assert plan(source, MethodSettings(group_size=size), target=target)


def marlin_model(directory: Path) -> LanguageFiles:
    return language_model(
        directory / "model",
        num_hidden_layers=1,
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
    )


def test_servers_on_marlin_need_whole_tiles(source: LanguageFiles) -> None:
    with pytest.raises(ConfigError, match="multiple of 128 inputs and 64 outputs, not 64 and 64"):
        plan(source, target="vllm")


@pytest.mark.parametrize("layout", ["gemv", "gemv_fast"])
def test_servers_read_gemm_alone(layout: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"target vllm reads no {layout}"):
        plan(marlin_model(tmp_path), target="vllm", layout=layout)


def test_gptq_files_have_no_zero_points(source: LanguageFiles) -> None:
    with pytest.raises(ConfigError, match="layout gptq has no zero points"):
        plan(source, layout="gptq")


def test_true_act_order_needs_the_gptq_layout(source: LanguageFiles) -> None:
    method = MethodSettings(method="gptq", group_size=32, desc_act=True)
    with pytest.raises(ConfigError, match="which group a column is of"):
        plan(source, method, layout="gemm")
    assert plan(source, method).conversion.scheme.layout == "gptq"


@pytest.mark.parametrize(("bits", "layout"), [(4, "gemm"), (8, "gptq")])
def test_awq_of_eight_bits_is_stored_as_gptq(bits: int, layout: str, source: LanguageFiles) -> None:
    method = MethodSettings(bits=bits, group_size=32)
    assert plan(source, method).conversion.scheme.layout == layout


def test_eight_bits_do_not_fit_the_awq_layout(source: LanguageFiles) -> None:
    with pytest.raises(CheckpointError, match="layout gemm holds 4 bits, not 8"):
        plan_conversion(source, MethodSettings(bits=8, group_size=32), RunSettings(layout="gemm"))


@pytest.mark.parametrize(
    ("room", "message"),
    [("available_memory", "memory .* of 1.0 kB free: use fewer calibration tokens")],
)
def test_too_little_memory_is_refused(
    room: str, message: str, source: LanguageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, room, lambda: 1000)
    with pytest.raises(ConfigError, match=message):
        plan(source)


def test_too_little_disk_is_refused_and_what_is_there_counts(
    source: LanguageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = next(need for need in plan(source).needs if need.what == "disk").size
    usage = type("Usage", (), {"free": needed - 10_000})
    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="disk .* free: make room, or name an output"):
        plan(source)
    (source.directory.parent / "out.partial").mkdir()
    (source.directory.parent / "out.partial/layer-00000.safetensors").write_bytes(b"0" * 10_000)
    assert plan(source)


def test_a_refused_run_writes_nothing(
    source: LanguageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match="not enough room"):
        quantize(source, source.directory.parent / "out")
    assert [path.name for path in source.directory.parent.iterdir()] == ["model"]


def test_no_calibration_tokens_is_refused(source: LanguageFiles) -> None:
    with pytest.raises(ConfigError, match="no calibration tokens"):
        make_plan(source, Work(0, 0), METHOD, RunSettings(), source.directory.parent / "out")


def test_planned_memory_is_near_what_a_process_takes(tmp_path: Path) -> None:
    """Never less than it takes beyond what it had before, and not three times as much."""
    sizes = ["--gigabytes", "0", "--hidden", "768", "--layers", "1", "--vocabulary", "1000"]
    command = [sys.executable, HERE / "peak_memory.py", tmp_path, *sizes, "--method", "rtn"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert 1 <= (found["planned"] - found["before"]) / (found["peak"] - found["before"]) <= 3
    assert abs(found["reported"] / found["peak"] - 1) < 0.2


def test_the_time_grows_with_tokens_layers_and_the_method(
    source: LanguageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "_speed", lambda device: 1e9)
    deeper = language_model(tmp_path / "deeper", num_hidden_layers=4)
    settings, output = RunSettings(), tmp_path / "out"
    seconds = plan(source).seconds
    assert make_plan(deeper, WORK, METHOD, settings, output).seconds == 2 * seconds
    assert make_plan(source, Work(2000, 200), METHOD, settings, output).seconds > 1.5 * seconds
    assert plan(source, MethodSettings(group_size=32)).seconds > seconds


# --- what stays float


OUTSIDE = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


def test_a_layer_is_kept_by_seven_full_names() -> None:
    kept = kept_modules(12, (1,), (), OUTSIDE)
    assert kept == tuple(f"model.layers.1.{name}" for name in LINEARS)


def test_negative_layers_count_from_the_end() -> None:
    kept = kept_modules(12, parse_layers("0,1,-1"), (), OUTSIDE)
    assert sorted({int(name.split(".")[2]) for name in kept}) == [0, 1, 11]


@pytest.mark.parametrize("index", [12, -13])
def test_a_layer_that_is_not_there_is_an_error(index: int) -> None:
    with pytest.raises(ConfigError, match=f"layer {index}; the model has layers 0 to 11"):
        kept_modules(12, (index,), (), OUTSIDE)


@pytest.mark.parametrize(
    ("part", "count"),
    [
        ("model.layers.1", 7),
        ("model.layers.1.", 7),
        ("layers.11", 7),
        ("mlp.gate_proj", 12),
        ("self_attn", 48),
        ("model.layers.3.mlp.up_proj", 1),
        ("lm_head", 0),
        ("embed_tokens", 0),
    ],
)
def test_parts_of_names_match_whole_numbers(part: str, count: int) -> None:
    assert len(kept_modules(12, (), (part,), OUTSIDE)) == count


@pytest.mark.parametrize("part", ["visual", "model.layers.12", ""])
def test_a_part_that_fits_nothing_is_an_error(part: str) -> None:
    with pytest.raises(ConfigError, match="part of no module|empty name"):
        kept_modules(12, (), (part,), OUTSIDE)


def test_linears_that_read_the_same_are_kept_together(source: LanguageFiles) -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.gate_proj, .* in 1 more sets"):
        plan(source, modules_to_not_convert=("up_proj",))
    plan(source, modules_to_not_convert=("up_proj", "gate_proj"))


# --- settings


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5gb", 1_500_000_000)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB"])
def test_what_is_no_size_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size; write it like 5GB"):
        parse_size(text)


def test_what_is_no_list_of_layers_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'first' is not a list of layers"):
        parse_layers("first")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layout": "marlin"}, "unknown layout 'marlin'; known: gemm"),
        ({"target": "tgi"}, "unknown target 'tgi'; known: torch, vllm"),
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"shard_size": -1}, "shard_size=-1"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunSettings(**wrong)


# --- how much memory there is


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """8 GB available, no limits."""
    write(tmp_path / "proc/meminfo", "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/work/job\n")
    return tmp_path / "proc", tmp_path / "cgroup"


def test_without_a_limit_it_is_what_the_machine_has(machine: tuple[Path, Path]) -> None:
    assert available_memory(*machine) == 8_000_000 * 1024
    write(machine[1] / "work/job/memory.max", "max\n")
    write(machine[1] / "work/job/memory.current", "100\n")
    assert available_memory(*machine) == 8_000_000 * 1024


@pytest.mark.parametrize("place", ["work/job", "work", "."])
def test_every_limit_above_the_process_counts(place: str, machine: tuple[Path, Path]) -> None:
    folder = machine[1] / place
    write(folder / "memory.max", "5000\n")
    write(folder / "memory.current", "2000\n")
    write(folder / "memory.stat", "anon 1500\ninactive_file 300\n")
    assert available_memory(*machine) == 5000 - 2000 + 300


def test_limits_of_the_first_version_count(machine: tuple[Path, Path]) -> None:
    write(machine[0] / "self/cgroup", "5:cpu:/other\n4:memory:/docker/abc\n")
    folder = machine[1] / "memory"
    write(folder / "memory.limit_in_bytes", "7000\n")
    write(folder / "memory.usage_in_bytes", "3000\n")
    assert available_memory(*machine) == 4000
    write(folder / "memory.limit_in_bytes", f"{2**63 - 4096}\n")
    assert available_memory(*machine) == 8_000_000 * 1024


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        ((), "no linear of a layer"),
        (layer_linears(3), "layer 3"),
        ((*layer_linears(0), *layer_linears(11)), "layers 0, 11"),
        (layer_linears(3)[3:4], "model.layers.3.self_attn.o_proj"),
        ((*layer_linears(0), layer_linears(2)[3]), "layer 0 and model.layers.2.self_attn.o_proj"),
        (
            [layer_linears(i)[3] for i in range(5)],
            "5 linears: model.layers.0.self_attn.o_proj, model.layers.1.self_attn.o_proj, "
            "model.layers.2.self_attn.o_proj ...",
        ),
    ],
)
def test_whole_layers_that_are_kept_are_told_by_number(kept: Sequence[str], text: str) -> None:
    assert kept_text(kept) == text
