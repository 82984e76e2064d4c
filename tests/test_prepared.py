"""Kernel-ready copies: equal to what they were made from, and never used for anything else."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantized_models import GEMM, INT8, quantize_language_model, quantize_opens2s
from torch import nn

from omnispeech.checkpoint import opens2s, prepared, prepared_key
from omnispeech.checkpoint.kernel_ready import KernelReady, write_kernel_ready
from omnispeech.checkpoint.manifest import Manifest
from omnispeech.checkpoint.models_directory import choose_sources
from omnispeech.checkpoint.opens2s import Loading, load_opens2s
from omnispeech.checkpoint.prepared import find_prepared, prepared_entries
from omnispeech.checkpoint.prepared_key import Machine
from omnispeech.checkpoint.tensor_file import TensorFile
from omnispeech.cli import main
from omnispeech.layers.linear import QuantizedLinear
from omnispeech.layers.packing import QuantizedWeight, Scheme

OPENS2S = Path(__file__).parent / "golden" / "opens2s" / "opens2s-tiny"
CPU = torch.device("cpu")
MACHINE = Machine(CPU)
AWQ = "OpenS2S-llm-awq"


# one linear


def weight(bits: int, rows: int = 70, columns: int = 128, *, act_order: bool = False) -> Any:
    groups = columns // 32
    group_of = torch.arange(columns, dtype=torch.int32) // 32
    return QuantizedWeight(
        codes=torch.randint(2**bits, (rows, columns), dtype=torch.uint8),
        zeros=torch.full((rows, groups), 2 ** (bits - 1), dtype=torch.uint8),
        scales=torch.rand(rows, groups).half() / 10,
        bits=bits,
        group_of=group_of[torch.randperm(columns)] if act_order else None,
    )


def salient(rows: int = 70) -> Any:
    residual = torch.randint(-128, 128, (rows, 2), dtype=torch.int8)
    return torch.tensor([3, 77]), residual, torch.tensor([0.01, 0.02]).half()


LINEARS = {
    "int4": lambda: QuantizedLinear(weight(4), None, dtype=torch.float32, device=CPU),
    "int8": lambda: QuantizedLinear(weight(8), None, dtype=torch.float32, device=CPU),
    "reference": lambda: QuantizedLinear(
        weight(4), None, dtype=torch.float32, device=CPU, kernel="reference"
    ),
    "act order": lambda: QuantizedLinear(
        weight(4, act_order=True), torch.randn(70), dtype=torch.float32, device=CPU
    ),
    "unequal groups": lambda: QuantizedLinear(
        replace(weight(4), group_of=torch.randint(4, (128,), dtype=torch.int32)),
        None,
        dtype=torch.float32,
        device=CPU,
    ),
    "salient": lambda: QuantizedLinear(
        weight(4), torch.randn(70), dtype=torch.bfloat16, device=CPU, salient=salient()
    ),
}


@pytest.mark.parametrize("kind", LINEARS)
def test_a_linear_that_was_kept_is_the_one_that_was_built(kind: str, tmp_path: Path) -> None:
    built = LINEARS[kind]()
    write_kernel_ready(tmp_path / "file", {"a.linear": built})
    ready = KernelReady(tmp_path / "file")
    biases = {} if built.bias is None else {"a.linear": built.bias}
    ((name, kept),) = ready.read(["a.linear"], biases, CPU, 2)
    assert (name, str(kept)) == ("a.linear", str(built))
    assert same(kept, built)
    for rows in (1, 100):
        x = torch.randn(rows, 128)
        assert torch.equal(kept(x), built(x))
    assert torch.equal(kept.dequantize(), built.dequantize())


def same(one: nn.Module, other: nn.Module) -> bool:
    """Bit for bit, parameters and buffers."""
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (one, other))
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype
        for name in ours
    )


# models


@pytest.fixture
def models(tmp_path: Path) -> Path:
    shutil.copytree(OPENS2S, tmp_path / "OpenS2S")
    (tmp_path / "glm-4-voice-decoder").mkdir()
    quantize_language_model(tmp_path / "OpenS2S", tmp_path / AWQ)
    Manifest(tmp_path).enter(AWQ, {"by": "a test"})
    return tmp_path


def load(models: Path, llm: str = AWQ, *, prepare: bool = True, kernel: str = "auto") -> Any:
    loading = Loading(threads=2, prepare=prepare)
    path = models / llm
    return load_opens2s(
        models / "OpenS2S", CPU, torch.float32, llm=path, kernel=kernel, loading=loading
    ).model


def copies(models: Path) -> list[str]:
    return sorted(path.name for path in models.glob("*.prepared-*"))


@contextmanager
def bytes_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Of tensors that are read from files under `path`."""
    read: list[int] = []
    original = TensorFile.read_bytes

    def spy(self: TensorFile, name: str, target: Any, *args: Any) -> None:
        if path in self.path.parents:
            read.append(len(target))
        original(self, name, target, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TensorFile, "read_bytes", spy)
        yield read


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("scheme", [GEMM, Scheme("gptq", 4, 32)])
def test_the_second_start_repacks_nothing_and_holds_the_same(
    models: Path, scheme: Scheme, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"gemm": AWQ, "gptq": "OpenS2S-llm-gptq"}[scheme.layout]
    if name != AWQ:
        quantize_language_model(OPENS2S, models / name, scheme)
        Manifest(models).enter(name, {"by": "a test"})
    plain = load(models, name, prepare=False, kernel=kernel)
    assert copies(models) == []
    first = load(models, name, kernel=kernel)
    (copy,) = copies(models)
    monkeypatch.setattr(
        "omnispeech.checkpoint.weight_plan.unpack", lambda *_: pytest.fail("repacked")
    )
    with bytes_of(models / name, monkeypatch) as read:
        second = load(models, name, kernel=kernel)
    entries = TensorFile(models / name / "model.safetensors").entries
    packed = ("qweight", "qzeros", "scales", "g_idx")
    assert sum(read) == sum(e.size for n, e in entries.items() if not n.endswith(packed))
    assert same(plain, first) and same(first, second)
    assert copies(models) == [copy]


def test_eight_bit_models_and_what_comes_from_elsewhere_have_copies_of_their_own(
    models: Path,
) -> None:
    quantize_opens2s(OPENS2S, models / "OpenS2S-8bit")
    Manifest(models).enter("OpenS2S-8bit", {"by": "a test"})
    loading, base = Loading(prepare=True), models / "OpenS2S-8bit"
    whole = load_opens2s(base, CPU, torch.float32, loading=loading).model
    load_opens2s(base, CPU, torch.float32, llm=models / AWQ, loading=loading)
    assert [name.partition(".")[0] for name in copies(models)] == ["OpenS2S-8bit"] * 2 + [AWQ]
    before = copies(models)
    again = load_opens2s(base, CPU, torch.float32, loading=loading).model
    assert same(whole, again)
    assert copies(models) == before


def test_the_manifest_says_what_a_copy_was_made_from_and_for(models: Path) -> None:
    load(models)
    (copy,) = copies(models)
    key = Manifest(models).entry(copy).made["prepared"]
    assert key["source"] == AWQ and key["kernel"] == "torch" and key["device"] == "cpu"
    assert key["torch"] == torch.__version__
    assert key["capability"] == torch.backends.cpu.get_cpu_capability()
    assert main(["verify", "--models", str(models), copy]) == 0


def another_model(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(models / AWQ)
    quantize_language_model(OPENS2S, models / AWQ, Scheme("gemm", 4, 64))
    Manifest(models).enter(AWQ, {"by": "a test"})


def another_torch(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "9.9")


def another_tile(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_key, "tile_orders", lambda device: b"another")


@pytest.mark.parametrize("change", [another_model, another_torch, another_tile])
def test_a_copy_of_what_is_no_longer_here_is_removed_and_another_made(
    models: Path, change: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load(models)
    (old,) = copies(models)
    change(models, monkeypatch)
    (found,) = find_prepared(choose_sources(models), MACHINE).values()
    assert found.state == "outdated"
    caplog.set_level("INFO")
    caplog.clear()
    second = load(models)
    (new,) = copies(models)
    assert new != old and set(prepared_entries(models)) == {new}
    assert f"removing {old}" in caplog.text
    assert caplog.text.count("kept for the next start") == 1
    assert same(second, load(models, prepare=False))


def test_a_copy_for_another_kernel_or_machine_stays(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(models)
    load(models, kernel="reference")
    monkeypatch.setattr(prepared_key, "_capability", lambda device: "sm_90")
    load(models)
    assert len(copies(models)) == len(prepared_entries(models)) == 3


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncated, one_bit, gone])
def test_a_damaged_copy_is_not_used_and_made_again(
    models: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(models)
    (copy,) = copies(models)
    damage(models / copy / "model.safetensors")
    assert same(load(models), first)
    assert f"{models / copy} is not used, and made again" in caplog.text
    caplog.clear()
    assert same(load(models), first)
    assert caplog.text == ""
    assert main(["verify", "--models", str(models), copy, "--deep"]) == 0


@pytest.mark.parametrize("good", [0, 1])
def test_a_copy_that_is_cut_short_while_it_is_read_is_not_used_and_made_again(
    models: Path, good: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, read = models / "OpenS2S-8bit", KernelReady.read
    quantize_opens2s(OPENS2S, base)
    Manifest(models).enter(base.name, {"by": "a test"})
    first = load_opens2s(base, CPU, torch.float32, loading=Loading(prepare=True)).model
    (copy,) = copies(models)
    reads: list[int] = []

    def cut(self: KernelReady, *given: Any) -> Any:
        if given[0] and len(reads) == good:  # language models that are read to their end
            (models / copy / "model.safetensors").write_bytes(b"")
        reads.extend([1] * bool(given[0]))
        return read(self, *given)

    loading = Loading(prepare=True)
    with monkeypatch.context() as patch:
        patch.setattr(KernelReady, "read", cut)
        again = load_opens2s(base, CPU, torch.float32, loading=loading).model
    assert len(reads) == good + 1 and same(again, first)
    assert caplog.text.count(f"{models / copy} is not used, and made again: ") == 1
    assert "keep kernel-ready weights" in loading.phases.done()
    assert main(["verify", "--models", str(models), copy, "--deep"]) == 0
    third = load_opens2s(base, CPU, torch.float32, loading=Loading(prepare=True)).model
    assert same(third, first)


def test_what_is_in_the_place_of_a_copy_makes_room_for_it(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = load(models)
    (copy,) = copies(models)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "weights"
    places = {
        "a file": lambda path: path.write_bytes(b""),
        "a link to nothing": lambda path: path.symlink_to(elsewhere),
        "a link to others": lambda path: (elsewhere.mkdir(), path.symlink_to(elsewhere)),
    }
    for put in places.values():
        shutil.rmtree(models / copy)
        put(models / copy)
        (models / f"{copy}.partial").symlink_to("nowhere")
        assert [p.state for p in find_prepared(choose_sources(models), MACHINE).values()] == [
            "outdated"
        ]
        assert same(load(models), first)
        assert copies(models) == [copy] and not (models / copy).is_symlink()
        assert main(["verify", "--models", str(models), copy]) == 0
    assert elsewhere.is_dir()  # nothing outside of the models directory is deleted


def test_a_copy_whose_entry_tells_of_another_header_is_not_used(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(models)
    (copy,) = copies(models)
    made = dict(Manifest(models).entry(copy).made) | {"header": "0" * 64}
    Manifest(models).enter(copy, made)
    load(models)
    assert "its header is not the one that was written" in caplog.text


def test_a_copy_and_an_entry_of_another_model_are_not_used(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(models)
    (mine,) = copies(models)
    shutil.copytree(models / AWQ, models / "other")
    quantize_language_model(OPENS2S, models / "other", Scheme("gemm", 4, 32), part="llm")
    Manifest(models).enter("other", {"by": "a test"})
    load(models, "other")
    (other,) = set(copies(models)) - {mine}
    shutil.rmtree(models / mine)
    (models / other).rename(models / mine)
    Manifest(models).enter(mine, Manifest(models).entry(other).made)
    assert same(load(models), load(models, prepare=False))
    assert "its entry is of another copy" in caplog.text


def test_nothing_is_kept_of_a_model_that_was_replaced_while_it_was_read(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = opens2s._load

    def load_slowly(plan: Any, *given: Any) -> None:
        if plan.source.endswith(AWQ):
            another_model(models, monkeypatch)  # its files are open already
        real(plan, *given)

    with monkeypatch.context() as patch:
        patch.setattr(opens2s, "_load", load_slowly)
        load(models)
    assert f"{AWQ} was replaced while it was read" in caplog.text
    assert copies(models) == []
    load(models)
    assert same(load(models), load(models, prepare=False))


@pytest.mark.parametrize("ending", [".partial", ""])
def test_a_start_that_was_killed_while_it_wrote_leaves_nothing_behind(
    models: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(models)
    (copy,) = copies(models)
    (models / copy).rename(models / f"{copy}{ending}.moved")
    Manifest(models).forget(copy)
    (models / f"{copy}{ending}.moved").rename(models / f"{copy}{ending}")
    another_torch(models, monkeypatch)  # what was left has another name than the next copy
    load(models)
    assert copies(models) != [copy]
    assert copies(models) == list(prepared_entries(models))


def test_a_damaged_copy_makes_room_for_the_next(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(models)
    (copy,) = copies(models)
    one_bit(models / copy / "model.safetensors")

    def disk_usage(path: Path) -> Any:
        return SimpleNamespace(free=0 if (models / copy).exists() else 1 << 40)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    load(models)
    assert [p.state for p in find_prepared(choose_sources(models), MACHINE).values()] == ["current"]


def test_where_nothing_can_be_written_the_start_goes_on(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "write_kernel_ready", refuse)
        model = load(models)
    assert "cannot be written" in caplog.text and "--no-prepare" in caplog.text
    assert copies(models) == [] and same(model, load(models, prepare=False))
    caplog.clear()
    monkeypatch.setattr(prepared, "ROOM", 1 << 62)
    load(models)
    assert "the disk has" in caplog.text and copies(models) == []


def test_two_starts_at_once_write_one_copy(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (mine,) = find_prepared(choose_sources(models), MACHINE).values()
    with mine._locked():
        load(models)
    assert "is being written by another start" in caplog.text
    assert copies(models) == []


def test_a_copy_is_no_model_and_no_leftover(
    models: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    before = choose_sources(models)
    assert [p.state for p in find_prepared(before, MACHINE).values()] == ["absent"]
    load(models)
    caplog.set_level("INFO")
    caplog.clear()
    assert choose_sources(models) == before
    assert "prepared" not in caplog.text
    ((name, found),) = find_prepared(before, MACHINE).items()
    assert (name, found.state, found.name) == (AWQ, "current", copies(models)[0])
    shutil.rmtree(found.path)
    assert main(["verify", "--models", str(models), found.name]) == 0
    assert "makes it again" in capsys.readouterr().out
    assert main(["forget", "--models", str(models), found.name]) == 0


def test_verify_tells_of_a_copy_of_another_model(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load(models)
    another_model(models, monkeypatch)
    assert main(["verify", "--models", str(models), *copies(models)]) == 1
    assert f"made from a {AWQ} that is no longer here" in capsys.readouterr().out


def test_nothing_is_kept_of_models_that_are_not_quantized_or_not_entered(models: Path) -> None:
    loading = Loading(prepare=True)
    load_opens2s(models / "OpenS2S", CPU, torch.float32, loading=loading)
    assert find_prepared(choose_sources(models, "bf16"), MACHINE) == {}
    quantize_language_model(OPENS2S, models / "other", INT8)
    load(models, "other")
    assert copies(models) == []


def test_the_phases_of_a_load_tell_what_was_read(models: Path) -> None:
    expected = {"load speech LM", "load audio encoder and adapters", "load LLM"}
    for later in (False, True):
        loading = Loading(prepare=True)
        load_opens2s(models / "OpenS2S", CPU, torch.float32, llm=models / AWQ, loading=loading)
        done = loading.phases.done()
        assert list(done)[0] == "check checkpoint"
        assert {name for name, phase in done.items() if phase.size} == expected
        assert ("keep kernel-ready weights" in done) is not later
    entries = TensorFile(OPENS2S / "model.safetensors").entries
    size = sum(e.size for n, e in entries.items() if n.startswith("tts_lm_model."))
    assert done["load speech LM"].size == size
