"""The file formats: against AutoAWQ's own files, against bits set by hand, and there and back."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from omnispeech.errors import CheckpointError
from omnispeech.layers.packing import (
    QuantizedWeight,
    Scheme,
    pack,
    packed_dtypes,
    packed_shapes,
    unpack,
)

GOLDEN = Path(__file__).parent / "golden/awq"


def linears_of_autoawq(layout: str, group_size: int) -> dict[str, dict[str, Tensor]]:
    file = load_file(GOLDEN / f"tiny-qwen3-awq-{layout}-g{group_size}" / "model.safetensors")
    names = [name.removesuffix(".qweight") for name in file if name.endswith(".qweight")]
    assert len(names) == 14
    return {
        name: {suffix: file[f"{name}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")}
        for name in names
    }


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    if (a.group_of is None) != (b.group_of is None) or a.bits != b.bits:
        return False
    pairs = [(a.codes, b.codes), (a.zeros, b.zeros), (a.scales, b.scales)]
    if a.group_of is not None and b.group_of is not None:
        pairs.append((a.group_of, b.group_of))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def random_weight(
    n: int, k: int, group_size: int, bits: int = 4, *, zero: int | None = None, seed: int = 0
) -> QuantizedWeight:
    random = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else k // group_size
    zeros = torch.randint(2**bits, (n, groups), generator=random, dtype=torch.uint8)
    exponents = torch.rand(n, groups, generator=random) * 22 - 22  # down to subnormal float16
    return QuantizedWeight(
        codes=torch.randint(2**bits, (n, k), generator=random, dtype=torch.uint8),
        zeros=zeros if zero is None else torch.full_like(zeros, zero),
        scales=torch.exp2(exponents).half(),
        bits=bits,
    )


def signed(*words: int) -> list[int]:
    """The same 32 bits as int32 has them."""
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast"])
def test_files_of_autoawq_are_reproduced_byte_for_byte(layout: str, group_size: int) -> None:
    scheme = Scheme(layout, 4, group_size)
    for name, tensors in linears_of_autoawq(layout, group_size).items():
        again = pack(unpack(tensors, scheme), scheme)
        for suffix, tensor in tensors.items():
            assert again[suffix].dtype == tensor.dtype, (name, suffix)
            assert torch.equal(again[suffix], tensor), (name, suffix)


@pytest.mark.parametrize("group_size", [64, 128])
def test_all_versions_of_autoawq_mean_the_same_numbers(group_size: int) -> None:
    gemm = linears_of_autoawq("gemm", group_size)
    for layout in ("gemv", "gemv_fast"):
        for name, tensors in linears_of_autoawq(layout, group_size).items():
            expected = unpack(gemm[name], Scheme("gemm", 4, group_size))
            assert same(unpack(tensors, Scheme(layout, 4, group_size)), expected), (layout, name)


def test_dequantized_weights_are_near_the_ones_autoawq_started_from() -> None:
    original = load_file(GOLDEN / "tiny-qwen3-fp16/model.safetensors")
    tensors = linears_of_autoawq("gemm", 64)["model.layers.0.self_attn.q_proj"]
    found = unpack(tensors, Scheme("gemm", 4, 64)).dequantize()
    norms = load_file(GOLDEN / "tiny-qwen3-awq-gemm-g64/model.safetensors")
    name = "model.layers.0.input_layernorm.weight"  # AutoAWQ moved its channel scales in there
    folded = found * (norms[name].float() / original[name].float())
    expected = original["model.layers.0.self_attn.q_proj.weight"].float()
    assert (folded - expected).norm() < 0.15 * expected.norm()


def test_gemm_packs_columns_0_2_4_6_1_3_5_7_from_the_lowest_nibble_up() -> None:
    weight = QuantizedWeight(
        codes=torch.tensor([[n + 1, 15 - n] for n in range(8)], dtype=torch.uint8),
        zeros=torch.arange(8, dtype=torch.uint8)[:, None],
        scales=torch.arange(8).half()[:, None],
        bits=4,
    )
    packed = pack(weight, Scheme("gemm", 4, 2))
    assert packed["qweight"].tolist() == [signed(0x86427531), signed(0x8ACE9BDF)]
    assert packed["qzeros"].tolist() == [signed(0x75316420)]
    assert packed["scales"].tolist() == [list(range(8))]


def test_gemv_packs_along_the_inputs_in_order_and_pads_groups_with_zero() -> None:
    weight = QuantizedWeight(
        codes=(torch.arange(64) % 16).to(torch.uint8)[None],
        zeros=torch.tensor([[5, 9]], dtype=torch.uint8),
        scales=torch.tensor([[0.5, 0.25]]).half(),
        bits=4,
    )
    packed = pack(weight, Scheme("gemv", 4, 32))
    assert packed["qweight"].tolist() == [signed(0x76543210, 0xFEDCBA98) * 4]
    assert packed["qzeros"].tolist() == [[0x95, 0, 0, 0]]
    assert packed["scales"].tolist() == [[0.5, 0.25] + [0] * 30]


def test_gemv_fast_interleaves_four_rows_and_every_eighth_input() -> None:
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    codes[0, [0, 8, 16, 24]] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    codes[0, 1] = 5  # the fifth lane
    codes[1, 32] = 6  # row 1: 16 words further; the second half of 64 inputs: 8 words further
    codes[3, 63] = 15
    weight = QuantizedWeight(
        codes=codes,
        zeros=torch.tensor([[3], [0], [1], [2]], dtype=torch.uint8),
        scales=torch.tensor([[0.5], [1], [2], [4]]).half(),
        bits=4,
    )
    packed = pack(weight, Scheme("gemv_fast", 4, 64))
    expected = [0] * 64
    expected[0], expected[1], expected[24], expected[63] = 0x4321, 5, 6, 0xF000 - 2**16
    assert packed["qweight"].tolist() == [expected]
    assert packed["qzeros"].tolist()[0] == [-1.5, 0, -2, -8]
    assert packed["scales"].tolist() == [[0.5, 1, 2, 4]] + [[0] * 4] * 15


def test_gptq_packs_along_the_inputs_and_stores_the_zero_point_less_one() -> None:
    four = QuantizedWeight(
        codes=torch.arange(8, dtype=torch.uint8).repeat(8, 1),
        zeros=torch.full((8, 2), 8, dtype=torch.uint8),
        scales=torch.arange(16).half().view(8, 2),
        bits=4,
    )
    packed = pack(four, Scheme("gptq", 4, 4))
    assert packed["qweight"].tolist() == [[0x76543210] * 8]
    assert packed["qzeros"].tolist() == [[0x77777777]] * 2
    assert packed["scales"].tolist() == [list(range(0, 16, 2)), list(range(1, 16, 2))]
    assert packed["g_idx"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    eight = QuantizedWeight(
        codes=torch.tensor([[1, 2, 3, 255]] * 4, dtype=torch.uint8),
        zeros=torch.full((4, 1), 128, dtype=torch.uint8),
        scales=torch.ones(4, 1).half(),
        bits=8,
    )
    packed = pack(eight, Scheme("gptq", 8, -1))
    assert packed["qweight"].tolist() == [signed(0xFF030201) * 4]
    assert packed["qzeros"].tolist() == [[0x7F7F7F7F]]


def test_int8_is_the_code_less_128() -> None:
    weight = QuantizedWeight(
        codes=torch.tensor([[0, 127, 128, 255]], dtype=torch.uint8),
        zeros=torch.tensor([[128]], dtype=torch.uint8),
        scales=torch.tensor([[0.5]]).half(),
        bits=8,
    )
    packed = pack(weight, Scheme("int8", 8, -1))
    assert packed["qweight"].tolist() == [[-128, -1, 0, 127]]
    assert packed["scales"].tolist() == [[0.5]]
    assert weight.dequantize().tolist() == [[-64, -0.5, 0, 63.5]]


LAYOUTS = st.sampled_from(
    [("gemm", 4), ("gemv", 4), ("gemv_fast", 4), ("gptq", 4), ("gptq", 8), ("int8", 8)]
)


@given(LAYOUTS, st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**16), st.data())
def test_every_layout_gives_back_what_was_packed(
    layout: tuple[str, int], n: int, groups: int, seed: int, data: st.DataObject
) -> None:
    name, bits = layout
    sizes = {"gemm": [1, 3, 32, 64, -1], "int8": [-1], "gptq": [8, 32, 64, 128, -1]}
    size = data.draw(st.sampled_from(sizes.get(name, [32, 64, 128, 192])))
    scheme = Scheme(name, bits, size)
    k = 64 * groups if size in (-1, 32) else size * groups
    zero = 2 ** (bits - 1) if name in ("gptq", "int8") else None
    weight = random_weight(8 * n, k, size, bits, zero=zero, seed=seed)
    packed = pack(weight, scheme)
    assert {s: tuple(t.shape) for s, t in packed.items()} == packed_shapes(scheme, 8 * n, k)
    assert {s: t.dtype for s, t in packed.items()} == packed_dtypes(scheme)
    assert all(t.is_contiguous() for t in packed.values())
    assert same(unpack(packed, scheme), weight)


@given(st.integers(0, 2**16))
def test_act_order_keeps_the_group_of_every_column(seed: int) -> None:
    weight = random_weight(8, 96, 32, zero=8, seed=seed)
    shuffled = torch.randperm(96, generator=torch.Generator().manual_seed(seed))
    group_of = (torch.arange(96, dtype=torch.int32) // 32)[shuffled]
    weight = QuantizedWeight(
        codes=weight.codes, zeros=weight.zeros, scales=weight.scales, bits=4, group_of=group_of
    )
    packed = pack(weight, Scheme("gptq", 4, 32))
    found = unpack(packed, Scheme("gptq", 4, 32))
    assert torch.equal(packed["g_idx"], group_of)
    assert same(found, weight)
    expected = (weight.codes.float() - 8) * weight.scales.float()[:, group_of.long()]
    assert torch.equal(found.dequantize(), expected)


def test_asymmetric_gptq_of_others_is_read_with_zero_points_that_wrapped_around() -> None:
    tensors = pack(random_weight(8, 32, 32, zero=8), Scheme("gptq", 4, 32))
    tensors["qzeros"] = torch.tensor([signed(0xE654321F)], dtype=torch.int32)  # stored: z - 1
    found = unpack(tensors, Scheme("gptq", 4, 32))
    assert found.zeros.flatten().tolist() == [0, 2, 3, 4, 5, 6, 7, 15]


@pytest.mark.parametrize("layout", ["gptq", "int8"])
def test_zero_points_that_a_layout_cannot_hold_are_refused(layout: str) -> None:
    scheme = Scheme(layout, 8, -1)
    with pytest.raises(CheckpointError, match="zero point"):
        pack(random_weight(8, 32, -1, bits=8), scheme)


@pytest.mark.parametrize(
    ("scheme", "n", "k", "said"),
    [
        (Scheme("gemm", 4, 64), 8, 96, "96 input columns .* group size 64"),
        (Scheme("gemm", 4, 32), 12, 64, "multiple of 8 outputs, not 12"),
        (Scheme("gemv", 4, -1), 8, 132, "multiple of 8 inputs, not 132"),
        (Scheme("gemv_fast", 4, 32), 6, 64, "multiple of 4 outputs, not 6"),
        (Scheme("gemv_fast", 4, 32), 8, 96, "multiple of 64 inputs, not 96"),
        (Scheme("gemv", 4, -1), 8, 96, "groups of 32, 64 or 128 and more, not 96"),
        (Scheme("gptq", 4, 4), 12, 32, "multiple of 8 outputs, not 12"),
        (Scheme("gptq", 8, 2), 4, 34, "multiple of 4 inputs, not 34"),
    ],
)
def test_a_linear_that_fits_no_layout_is_refused(scheme: Scheme, n: int, k: int, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        packed_shapes(scheme, n, k)


@pytest.mark.parametrize(
    ("layout", "bits", "group_size", "said"),
    [
        ("marlin", 4, 128, "known: gemm, gemv, gemv_fast, gptq, int8"),
        ("gemm", 8, 128, "holds 4 bits, not 8"),
        ("gptq", 3, 128, "holds 4 or 8 bits, not 3"),
        ("gemm", 4, 0, "group size 0"),
        ("gemv", 4, 16, "groups of 32, 64 or 128 and more, not 16"),
        ("gemv_fast", 4, 96, "groups of 32, 64 or 128 and more, not 96"),
        ("int8", 8, 128, "one scale for each row"),
    ],
)
def test_a_scheme_that_no_file_has_is_refused(
    layout: str, bits: int, group_size: int, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        Scheme(layout, bits, group_size)


def test_groups_that_are_no_neighbours_fit_only_gptq() -> None:
    weight = random_weight(8, 64, 32)
    group_of = torch.arange(64, dtype=torch.int32) % 2
    weight = QuantizedWeight(
        codes=weight.codes, zeros=weight.zeros, scales=weight.scales, bits=4, group_of=group_of
    )
    with pytest.raises(CheckpointError, match="cannot say which group"):
        pack(weight, Scheme("gemm", 4, 32))


def test_a_weight_of_other_groups_than_the_scheme_is_refused() -> None:
    with pytest.raises(CheckpointError, match="4 bits and 2 groups .* 4 bits and 1 groups"):
        pack(random_weight(8, 64, 32), Scheme("gemm", 4, 64))


def test_scales_too_large_for_gemv_fast_are_refused() -> None:
    weight = random_weight(8, 64, 64, zero=15)
    weight.scales.fill_(6e4)
    with pytest.raises(CheckpointError, match="float16"):
        pack(weight, Scheme("gemv_fast", 4, 64))


def test_damaged_tensors_are_named() -> None:
    scheme = Scheme("gptq", 4, 32)
    good = pack(random_weight(8, 64, 32, zero=8), scheme)
    with pytest.raises(CheckpointError, match="g_idx, which is missing"):
        unpack({s: t for s, t in good.items() if s != "g_idx"}, scheme)
    with pytest.raises(CheckpointError, match="scales is torch.float32"):
        unpack({**good, "scales": good["scales"].float()}, scheme)
    with pytest.raises(CheckpointError, match=r"scales is \[1, 8\].*must be \[2, 8\]"):
        unpack({**good, "scales": good["scales"][:1]}, scheme)
    with pytest.raises(CheckpointError, match="g_idx names groups 2 to 3, but there are 2"):
        unpack({**good, "g_idx": good["g_idx"] + 2}, scheme)
