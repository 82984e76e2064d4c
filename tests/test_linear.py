"""Quantized linears: every kernel against the dequantized weight, on every vector unit."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.layers import int4_matmul
from omnispeech.layers.int4_matmul import LARGE_BATCH, Int4Matmul, find_tile, learn_tile
from omnispeech.layers.int8_matmul import SMALL_BATCH
from omnispeech.layers.linear import QuantizedLinear, Salient, known_kernel
from omnispeech.layers.packing import QuantizedWeight

CPU = torch.device("cpu")
# what computing in bfloat16 costs: weights, scales and sums rounded to 8 bits; float16: 11 bits
BFLOAT16, FLOAT16, FLOAT32 = 6e-3, 6e-4, 1e-6
TOLERANCE = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}


def random_weight(
    n: int, k: int, group_size: int, bits: int = 4, zero: int | None = None
) -> QuantizedWeight:
    random = torch.Generator().manual_seed(n + k)
    groups = k // group_size
    zeros = torch.randint(2**bits, (n, groups), generator=random, dtype=torch.uint8)
    return QuantizedWeight(
        codes=torch.randint(2**bits, (n, k), generator=random, dtype=torch.uint8),
        zeros=zeros if zero is None else torch.full_like(zeros, zero),
        scales=(torch.rand(n, groups, generator=random) * 0.01 + 0.001).half(),
        bits=bits,
    )


def in_act_order(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight with its columns, and what group they are of, shuffled."""
    _, k = weight.codes.shape
    order = torch.randperm(k, generator=torch.Generator().manual_seed(1))
    group_of = (torch.arange(k, dtype=torch.int32) // (k // weight.scales.shape[1]))[order]
    return QuantizedWeight(
        codes=weight.codes[:, order],
        zeros=weight.zeros,
        scales=weight.scales,
        bits=weight.bits,
        group_of=group_of,
    )


def build(
    weight: QuantizedWeight,
    kernel: str = "auto",
    bias: Tensor | None = None,
    salient: Salient | None = None,
) -> QuantizedLinear:
    return QuantizedLinear(
        weight, bias, dtype=torch.float32, device=CPU, kernel=kernel, salient=salient
    )


def inputs(rows: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.float() - expected).norm() / expected.norm())


BATCHES = [1, 2, SMALL_BATCH, SMALL_BATCH + 1, LARGE_BATCH["cpu"], LARGE_BATCH["cpu"] + 1, 300]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_int4_kernel_computes_the_reference_at_every_batch(
    group_size: int, dtype: torch.dtype
) -> None:
    weight = random_weight(192, 512, group_size)
    linear = build(weight)
    assert linear.kernel_name == "torch int4"
    for rows in BATCHES:
        x = inputs(rows, 512, dtype)
        y = linear(x)
        assert y.dtype == dtype and y.shape == (rows, 192)
        assert error(y, x.float() @ weight.dequantize().T) < BFLOAT16, rows


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "weight",
    [random_weight(192, 512, 64), random_weight(50, 99, 33), random_weight(50, 96, 48, 8)],
    ids=["even", "odd", "8 bit"],
)
def test_reference_is_as_exact_as_its_dtype(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    linear = build(weight, "reference")
    assert linear.kernel_name == "reference"
    assert torch.equal(linear.dequantize(), weight.dequantize())
    for rows in (1, 50):
        x = inputs(rows, weight.codes.shape[1], dtype)
        assert error(linear(x), x.float() @ weight.dequantize().T) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group_size", [32, 64, 100, 400])
def test_int8_kernel_computes_the_reference_at_every_batch(
    group_size: int, dtype: torch.dtype
) -> None:
    k = 320 if group_size in (32, 64) else 400  # 100 and 400 columns are no multiple of 32
    weight = random_weight(72, k, group_size, 8, zero=128)
    linear = build(weight)
    assert linear.kernel_name == "torch int8"
    assert torch.equal(linear.dequantize(), weight.dequantize())
    for rows in BATCHES:
        x = inputs(rows, k, dtype)
        y = linear(x)
        assert y.dtype == dtype and y.shape == (rows, 72)
        assert error(y, x.float() @ weight.dequantize().T) < BFLOAT16, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 64), (8, 512), (8, 8)])
def test_the_precision_of_a_kernel_is_the_same_for_every_batch(
    bits: int, group_size: int, dtype: torch.dtype
) -> None:
    weight = random_weight(192, 512, group_size, bits, zero=2 ** (bits - 1))
    kernel, exact = build(weight), build(weight, "reference")
    for rows in BATCHES:
        x = inputs(rows, 512, dtype)
        expected = x.float() @ weight.dequantize().T
        assert BFLOAT16 / 6 < error(kernel(x), expected) < BFLOAT16, rows
        assert error(exact(x), expected) < TOLERANCE[dtype], rows


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("bits", [4, 8])
def test_act_order_keeps_the_fast_kernel(kernel: str, bits: int) -> None:
    weight = in_act_order(random_weight(64, 256, 64, bits, zero=2 ** (bits - 1)))
    linear = build(weight, kernel)
    assert linear.kernel_name == {"auto": f"torch int{bits}", "reference": "reference"}[kernel]
    assert error(linear.dequantize(), weight.dequantize()) < BFLOAT16
    for rows in (1, 300):
        x = inputs(rows, 256)
        assert error(linear(x), x @ weight.dequantize().T) < BFLOAT16


def test_rows_are_filled_up_to_whole_tiles() -> None:
    weight = random_weight(40, 128, 64)
    linear = build(weight)
    assert linear.kernel_name == "torch int4"
    assert error(linear.dequantize(), weight.dequantize()) < BFLOAT16
    for rows in BATCHES:
        x = inputs(rows, 128)
        assert error(linear(x), x @ weight.dequantize().T) < BFLOAT16


@pytest.mark.parametrize("group_size", [96, 480, 512])
def test_groups_that_the_kernel_does_not_know_are_made_of_ones_it_knows(group_size: int) -> None:
    weight = random_weight(64, 2 * group_size, group_size)
    linear = build(weight)
    assert linear.kernel_name == "torch int4"
    assert error(linear.dequantize(), weight.dequantize()) < BFLOAT16
    for rows in (3, 300):
        x = inputs(rows, 2 * group_size)
        assert error(linear(x), x @ weight.dequantize().T) < BFLOAT16


def unequal_groups() -> QuantizedWeight:
    weight = random_weight(8, 64, 32)
    group_of = torch.tensor([0] * 40 + [1] * 24, dtype=torch.int32)
    return QuantizedWeight(
        codes=weight.codes, zeros=weight.zeros, scales=weight.scales, bits=4, group_of=group_of
    )


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (random_weight(64, 96, 48), "groups of 48 columns"),
        (unequal_groups(), "differ in size"),
        (random_weight(64, 64, 32, 8), "zero points"),
        (random_weight(64, 64, 32, 2), "2 bits"),
    ],
)
def test_a_weight_that_no_kernel_takes_is_multiplied_by_the_reference_which_says_why(
    weight: QuantizedWeight, reason: str
) -> None:
    linear = build(weight, "torch")
    assert linear.kernel_name.startswith("reference: ") and reason in linear.kernel_name
    x = inputs(5, weight.codes.shape[1])
    assert error(linear(x), x @ weight.dequantize().T) < FLOAT32


def test_bias_is_added_in_the_dtype_of_the_input() -> None:
    weight = random_weight(64, 128, 32)
    bias = torch.arange(64) / 8
    for kernel in ("auto", "reference"):
        linear = build(weight, kernel, bias)
        x = inputs(3, 128, torch.bfloat16)
        y = linear(x)
        assert y.dtype == torch.bfloat16
        assert error(y, x.float() @ weight.dequantize().T + bias) < BFLOAT16


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_salient_columns_are_added_and_are_part_of_the_weight(kernel: str) -> None:
    weight = in_act_order(random_weight(64, 128, 32))
    columns = torch.tensor([3, 77, 127])
    residual = torch.randint(-128, 128, (64, 3), dtype=torch.int8)
    scales = torch.tensor([0.001, 0.002, 0.004]).half()
    linear = build(weight, kernel, salient=(columns, residual, scales))
    expected = weight.dequantize()
    expected[:, columns] += residual * scales.float()
    assert error(linear.dequantize(), expected) < BFLOAT16
    x = inputs(4, 128)
    assert error(linear(x), x @ expected.T) < BFLOAT16
    with pytest.raises(CheckpointError, match=r"\[64, 3\] with 3 scales .* 2 columns"):
        build(weight, salient=(columns[:2], residual, scales))


def test_no_rows_make_no_rows() -> None:
    for weight in (random_weight(64, 128, 32), random_weight(64, 128, 32, 8, zero=128)):
        for kernel in ("auto", "reference"):
            assert build(weight, kernel)(inputs(0, 128)).shape == (0, 64)


def size_of(module: nn.Module) -> int:
    return sum(b.numel() * b.element_size() for b in module.buffers())


def test_only_the_packed_form_stays_in_memory_and_none_of_it_in_the_state_dict() -> None:
    linear = build(random_weight(256, 1024, 128))
    assert size_of(linear) == 256 * 1024 // 2 + 256 * 8 * 4  # codes; scale and offset
    assert size_of(build(random_weight(256, 1024, 128), "reference")) < size_of(linear)
    assert linear.state_dict() == {}
    eight = build(random_weight(256, 1024, 128, 8, zero=128))
    assert size_of(eight) == 256 * 1024 + 256 * 8 * 2


def test_a_large_batch_equals_the_kernel_row_by_row() -> None:
    """Both ways through the same packed form, so that only roundings may differ."""
    linear = build(random_weight(320, 256, 64))
    x = inputs(LARGE_BATCH["cpu"] + 9, 256, torch.bfloat16)
    one_by_one = torch.cat([linear(row[None]) for row in x])
    torch.testing.assert_close(linear(x), one_by_one, atol=2e-2, rtol=2e-2)


def test_dequantized_is_what_the_kernel_multiplies_with() -> None:
    linear = build(random_weight(64, 128, 32))
    columns = linear(torch.eye(128, dtype=torch.bfloat16)[:8])
    torch.testing.assert_close(columns, linear.dequantize()[:, :8].T.bfloat16(), atol=0, rtol=2**-7)


@pytest.mark.parametrize("name", ["gemm", "GEMM", "gemv", "gemv_fast", "GEMVFast", "torch", "auto"])
def test_names_of_autoawq_mean_the_kernels_of_torch(name: str) -> None:
    assert build(random_weight(64, 128, 32), name).kernel_name == "torch int4"


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("marlin", "gptqmodel"),
        ("exllama", "gptqmodel"),
        ("ExllamaV2", "gptqmodel"),
        ("ipex", "intel_extension_for_pytorch"),
        ("gemlite", "gemlite"),
    ],
)
def test_a_kernel_of_another_package_is_refused_by_the_name_of_the_package(
    name: str, package: str
) -> None:
    with pytest.raises(ConfigError, match=f"{package}.*kernels here: auto, torch, reference"):
        known_kernel(name)


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'cutlass'.*auto, torch, reference"):
        build(random_weight(64, 128, 32), "cutlass")


def shuffling_packer(rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    """A packer like CUDA's: int32 words of tiles in an order that only it knows."""
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(3))

    def pack(codes: Tensor) -> Tensor:
        n, k = codes.shape
        tiles = codes.view(n // rows, rows, k // columns, columns).transpose(1, 2).flatten(2)
        fields = tiles[..., order]
        octets = fields[..., 0::2] | (fields[..., 1::2] << 4)
        return octets.contiguous().view(torch.int32).view(n // rows, k // columns, 32, -1)

    return pack


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_the_order_inside_any_tile_is_learned(columns: int) -> None:
    pack = shuffling_packer(8, columns)
    tile = learn_tile(pack, 8, columns, CPU)
    assert tile is not None
    codes = random_weight(24, 3 * columns, columns).codes
    assert torch.equal(tile.codes(pack(codes), *codes.shape), codes)


def test_a_packer_without_such_tiles_is_recognized() -> None:
    assert learn_tile(shuffling_packer(4, 64), 8, 64, CPU) is None
    assert learn_tile(lambda codes: codes[:, 0::2] & 7, 16, 2, CPU) is None


def test_a_kernel_that_multiplies_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = int4_matmul._multiply
    monkeypatch.setattr(int4_matmul, "_multiply", lambda *given: right(*given) * 1.01)
    int4_matmul._learn_on.cache_clear()
    try:
        linear = build(random_weight(64, 128, 32))
    finally:
        int4_matmul._learn_on.cache_clear()
    assert linear.kernel_name == "reference: torch's int4 kernel does not work on cpu"


def test_tiles_in_two_directions_are_dequantized_for_large_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What CUDA does, with its packer stood in for."""
    pack = shuffling_packer(8, 64)
    tile = learn_tile(pack, 8, 64, CPU)
    monkeypatch.setattr(int4_matmul, "find_tile", lambda device, columns: tile)
    monkeypatch.setattr(int4_matmul, "_packer", lambda device, columns: pack)
    weight = random_weight(40, 128, 64)
    linear = Int4Matmul(weight, CPU)
    x = inputs(LARGE_BATCH["cpu"] + 1, 128, torch.bfloat16)
    assert error(linear(x), x.float() @ weight.dequantize().T) < BFLOAT16


def test_probing_leaves_the_random_numbers_alone() -> None:
    int4_matmul._learn_on.cache_clear()
    before = torch.get_rng_state()
    assert find_tile(CPU, 128) is not None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_vector_units_lay_tiles_out_otherwise_and_compute_the_same(capability: str) -> None:
    chosen = "int4_kernel or int8_kernel or whole_tiles or large_batch or multiplies_with"
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run(test, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("columns", [32, 64, 512])
def test_int4_kernel_of_cuda_computes_the_reference_at_every_batch(columns: int) -> None:
    device = torch.device("cuda")
    weight = random_weight(192, columns, 32)
    linear = QuantizedLinear(weight, None, dtype=torch.bfloat16, device=device)
    assert linear.kernel_name == "torch int4"
    for rows in (1, 3, LARGE_BATCH["cuda"], LARGE_BATCH["cuda"] + 1, 300):
        x = inputs(rows, columns, torch.bfloat16)
        y = linear(x.to(device)).cpu()
        assert error(y, x.float() @ weight.dequantize().T) < BFLOAT16, rows
