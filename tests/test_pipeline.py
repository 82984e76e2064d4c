"""A run from the first layer to the verified directory, and one on a device that is too small."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from language_model_files import (
    METHOD,
    Rounding,
    calibration,
    language_model,
    write_language_model,
)
from quantization_runs import Spy, contents, crashing, device, quantize
from safetensors.torch import load_file, save_file

from omnispeech.calibration.samples import Calibration, Sample
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.layers.packing import Scheme
from omnispeech.models.qwen3 import Block
from omnispeech.quantization import layer_loop
from omnispeech.quantization.method import LayerResult
from omnispeech.quantization.methods.layer_quantizer import build_method
from omnispeech.quantization.methods.settings import MethodSettings
from omnispeech.quantization.state import WorkDirectory
from omnispeech.quantization.stored import read_weight
from omnispeech.quantization.stream import Stream


@pytest.fixture
def source(tmp_path: Path) -> LanguageFiles:
    return language_model(tmp_path / "model")


def test_every_linear_is_what_the_method_made_of_the_float_weight(
    source: LanguageFiles, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        expected = Rounding(METHOD).rounded(source.read(f"{name}.weight", torch.float32))
        found = read_weight(tensors.__getitem__, name, Scheme("gemm", 4, 32))
        assert torch.equal(found.dequantize(), expected.dequantize())
        assert f"{name}.weight" not in tensors


def test_what_is_not_quantized_is_stored_in_float16(source: LanguageFiles, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    for name in (*source.outside_names(), "model.layers.1.input_layernorm.weight"):
        assert tensors[name].dtype == torch.float16
        assert torch.equal(tensors[name], source.read(name, torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layers_hear_the_float_and_the_quantized_model(dtype: torch.dtype, tmp_path: Path) -> None:
    source = language_model(tmp_path / "model", dtype=dtype)
    spy = type("OneSpy", (Spy,), {"seen": []})
    quantize(source, tmp_path / "out", build=spy)
    given = calibration(source)
    floats = [sample.vectors.to(dtype) for sample in given.samples]
    quantized = list(floats)
    for index, (seen_floats, seen_quantized) in enumerate(spy.seen):
        torch.testing.assert_close(seen_floats, floats)
        torch.testing.assert_close(seen_quantized, quantized)
        floats = advanced(source, given, source.block(index, torch.device("cpu")), floats)
        quantized = advanced(source, given, rounded_block(source, index), quantized)
    assert not torch.allclose(floats[0], quantized[0], rtol=0.01)


def advanced(
    source: LanguageFiles, given: Calibration, block: Block, states: list[torch.Tensor]
) -> list[torch.Tensor]:
    counted = [sample.counted for sample in given.samples]
    cpu = torch.device("cpu")
    stream = Stream(source.config, states, counted, device=cpu, batch_tokens=2048)
    with torch.no_grad():
        stream.advance(block)
    return list(stream.states)


def rounded_block(source: LanguageFiles, index: int) -> Block:
    block = source.block(index, torch.device("cpu"))
    for name, parameter in block.named_parameters():
        if parameter.dim() == 2:
            parameter.data = Rounding(METHOD).rounded(parameter).dequantize()
        else:
            parameter.data = parameter.half().float()
        assert name
    return block


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast", "gptq"])
def test_every_layout_means_the_same(layout: str, source: LanguageFiles, tmp_path: Path) -> None:
    method = MethodSettings(method="rtn", group_size=32, zero_point=False)
    quantize(source, tmp_path / layout, method=method, layout=layout)
    tensors = load_file(tmp_path / layout / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj"
    expected = Rounding(method).rounded(source.read(f"{name}.weight", torch.float32))
    found = read_weight(tensors.__getitem__, name, Scheme(layout, 4, 32))
    assert torch.equal(found.dequantize(), expected.dequantize())


def test_eight_bits_are_stored_as_gptq(source: LanguageFiles, tmp_path: Path) -> None:
    method = MethodSettings(method="awq", bits=8, group_size=32)
    quantize(source, tmp_path / "out", method=method)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["sym"]) == ("gptq", 8, True)


def test_kept_layers_stay_float_and_are_listed_by_full_name(tmp_path: Path) -> None:
    source = language_model(tmp_path / "model", num_hidden_layers=12)
    report = quantize(source, tmp_path / "out", keep_fp_layers=(1, -1))
    names = load_file(tmp_path / "out/model.safetensors").keys()
    config = json.loads((tmp_path / "out/config.json").read_text())
    listed = config["quantization_config"]["modules_to_not_convert"]
    assert len(listed) == 14 and "model.layers.11.mlp.up_proj" in listed
    for i in range(12):
        assert (f"model.layers.{i}.mlp.up_proj.weight" in names) == (i in (1, 11))
        assert (f"model.layers.{i}.mlp.up_proj.qweight" in names) == (i not in (1, 11))
    assert report.data["unquantized"] == [
        *listed,
        "lm_head",
        "model.embed_tokens",
        "model.norm",
    ]


def test_a_part_of_a_name_keeps_a_layer_and_no_other(tmp_path: Path) -> None:
    source = language_model(tmp_path / "model", num_hidden_layers=12)
    report = quantize(source, tmp_path / "out", modules_to_not_convert=("layers.1", "lm_head"))
    assert {name.split(".")[2] for name in report.data["kept"]} == {"1"}


def test_single_linears_stay_float(tmp_path: Path) -> None:
    source = language_model(tmp_path / "model")
    report = quantize(source, tmp_path / "out", modules_to_not_convert=("down_proj", "o_proj"))
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {name.rsplit(".", 1)[-1] for name in report.data["kept"]} == {"down_proj", "o_proj"}
    for name in report.data["kept"]:
        assert stored[f"{name}.weight"].dtype == torch.float16
        assert f"{name}.qweight" not in stored
    assert "model.layers.0.mlp.up_proj.qweight" in stored


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    source = language_model(tmp_path / "model", tie_word_embeddings=True)
    quantize(source, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize(("value", "found"), [(1e5, "99840"), (float("nan"), "nan")])
def test_a_value_that_float16_cannot_hold_is_told_with_its_row_before_the_first_layer(
    name: str, value: float, found: str, tmp_path: Path
) -> None:
    source = language_model(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    tensors[name][95, 3] = value
    save_file(tensors, path)
    spy = type("OneSpy", (Spy,), {"seen": []})
    named = rf"{name} has values .*{found}, the first such in row 95;"
    with pytest.raises(CheckpointError, match=named):
        quantize(LanguageFiles.open(tmp_path / "model"), tmp_path / "out", build=spy)
    assert not (tmp_path / "out").exists() and not spy.seen
    tensors[name][95, 3] = source.read(name, torch.bfloat16)[95, 2]
    save_file(tensors, path)
    quantize(LanguageFiles.open(tmp_path / "model"), tmp_path / "out")


@pytest.mark.parametrize("default", [True, False], ids=["default method", "rounding"])
def test_codes_do_not_depend_on_the_micro_batch(default: bool, tmp_path: Path) -> None:
    build = build_method if default else HeardRounding
    method = MethodSettings(group_size=32) if default else METHOD
    source = language_model(tmp_path / "model", dtype=torch.float32)
    codes = []
    for tokens in (1, 70, 4096):
        quantize(source, tmp_path / str(tokens), batch_tokens=tokens, method=method, build=build)
        tensors = load_file(tmp_path / str(tokens) / "model.safetensors")
        codes.append(
            torch.cat(
                [
                    read_weight(tensors.__getitem__, m, Scheme("gemm", 4, 32)).codes.flatten()
                    for m in ("model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj")
                ]
            )
        )
    for other in codes[1:]:
        assert (other == codes[0]).float().mean() >= 0.999


class HeardRounding(Rounding):
    """Its ranges depend on what was heard, so that states reach the codes."""

    def quantize(
        self, block: Block, floats: Stream, quantized: Stream, kept: Collection[str] = ()
    ) -> LayerResult:
        heard = torch.cat([block.post_attention_layernorm(b.x) for b in quantized.batches()])
        block.mlp.up_proj.weight.data *= heard.abs().mean(0)
        return super().quantize(block, floats, quantized)


def long_calibration(source: LanguageFiles) -> Calibration:
    return calibration(source, lengths=(300, 200, 100))


def test_the_default_method_hears_the_same_whatever_the_micro_batch(tmp_path: Path) -> None:
    """Few different tokens make an ill-conditioned Gram matrix: its last bits decide codes."""
    directory = write_language_model(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[:3] *= 12
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    source = LanguageFiles.open(directory)
    given = calibration(source, (64,) * 24)
    for tokens in (64, 256, 1536):
        quantize(
            source,
            tmp_path / str(tokens),
            batch_tokens=tokens,
            method=MethodSettings(group_size=32),
            build=build_method,
            given=given,
        )
    files = [load_file(tmp_path / str(tokens) / "model.safetensors") for tokens in (64, 256, 1536)]
    for name, codes in files[0].items():
        for other in files[1:]:
            assert (other[name] == codes).float().mean() >= 0.99, name


def test_out_of_memory_takes_smaller_micro_batches_first(
    source: LanguageFiles, tmp_path: Path
) -> None:
    given = long_calibration(source)
    report = quantize(source, tmp_path / "out", build=device(300), given=given, batch_tokens=600)
    assert (report.data["sequence_length"], report.data["batch_tokens"]) == (300, 300)
    quantize(source, tmp_path / "small", given=given, batch_tokens=300)
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "small")
    assert ours["model.safetensors"] == theirs["model.safetensors"]


def test_then_sequences_are_cut_and_no_token_is_lost(source: LanguageFiles, tmp_path: Path) -> None:
    spy = type("Both", (device(100), Spy), {"seen": []})
    given = long_calibration(source)
    report = quantize(source, tmp_path / "out", build=spy, given=given, batch_tokens=600)
    assert (report.data["sequence_length"], report.data["batch_tokens"]) == (75, 75)
    assert all(sum(map(len, states)) == 600 for states, _ in spy.seen)


def test_only_the_failed_layer_is_repeated(source: LanguageFiles, tmp_path: Path) -> None:
    build = device(100, layers=(1,))
    spy = type("Both", (build, Spy), {"seen": []})
    quantize(source, tmp_path / "out", build=spy, given=long_calibration(source), batch_tokens=600)
    assert [len(states) for states, _ in spy.seen] == [3, 9, 9]
    assert spy.calls == [0, 1, 2]


def test_a_device_too_small_for_64_tokens_is_an_error(
    source: LanguageFiles, tmp_path: Path
) -> None:
    log = tmp_path / "out.partial/quantization_report.log"
    with pytest.raises(ConfigError, match=rf"layer 0 even with sequences of 64 tokens.*{log}"):
        quantize(source, tmp_path / "out", build=device(60), given=long_calibration(source))
    assert "out of memory at layer 0" in log.read_text()
    reduced = "sequences reduced from 300 to 64 tokens (out of memory), micro-batch 64 tokens"
    assert reduced in log.read_text()


def test_a_run_continued_after_out_of_memory_is_the_same(
    source: LanguageFiles, tmp_path: Path
) -> None:
    given = long_calibration(source)
    asked: dict[str, Any] = {"given": given, "batch_tokens": 600}
    quantize(source, tmp_path / "undisturbed", build=device(100, layers=(1,)), **asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkDirectory, "save_layer", crashing(WorkDirectory.save_layer, 2, True))
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out", build=device(100, layers=(1,)), **asked)
    quantize(source, tmp_path / "out", **asked)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("batch_tokens", "longest", "then"),
    [
        (2048, 300, (1024, 300)),
        (400, 300, (300, 300)),
        (300, 300, (150, 150)),
        (1, 300, (150, 150)),
        (100, 100, (64, 64)),
        (64, 64, None),
        (128, 40, (64, 40)),
        (40, 40, None),
    ],
)
def test_what_is_tried_next(batch_tokens: int, longest: int, then: tuple[int, int] | None) -> None:
    assert layer_loop.smaller(batch_tokens, longest) == then


def test_salient_columns_are_reported_without_being_asked_for(
    source: LanguageFiles, tmp_path: Path
) -> None:
    method = MethodSettings(group_size=32)
    report = quantize(source, tmp_path / "out", method=method, build=build_method)
    notes = report.data["layers"][2]["linears"]["mlp.down_proj"]["notes"]
    assert len(notes["salient"]["columns"]) == 32


def test_samples_that_do_not_count_are_heard_but_not_judged(
    source: LanguageFiles, tmp_path: Path
) -> None:
    given = calibration(source)
    loud = [
        Sample(torch.where(s.counted[:, None], s.vectors, 100 * s.vectors), s.counted)
        for s in given.samples
    ]
    other = Calibration(samples=tuple(loud), tokens=given.tokens, sources=(), digest="loud")
    first = quantize(source, tmp_path / "first")
    second = quantize(source, tmp_path / "second", given=other)
    losses = [r.data["layers"][0]["linears"]["self_attn.q_proj"]["loss"] for r in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
