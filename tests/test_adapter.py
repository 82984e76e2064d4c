import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omnispeech.errors import CheckpointError
from omnispeech.models.adapter import Adapter, AdapterConfig


def build(kernel_sizes: tuple[int, ...] = (5, 5)) -> Adapter:
    torch.manual_seed(0)
    config = AdapterConfig(encoder_dim=6, llm_dim=8, inner_dim=4, kernel_sizes=kernel_sizes)
    return Adapter(config).eval().requires_grad_(False)


def gated_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x: [T, C] -> [T', D], one output position at a time."""
    kernel = weight.shape[2]
    padded = torch.nn.functional.pad(x, (0, 0, kernel // 2, kernel // 2))  # [T + pad, C]
    places = range(0, len(padded) - kernel + 1, 2)
    rows = [torch.einsum("kc,dck->d", padded[i : i + kernel], weight) + bias for i in places]
    value, gate = torch.stack(rows).chunk(2, dim=1)
    return value * gate.sigmoid()


@pytest.mark.parametrize("kernel_sizes", [(5, 5), (3,), (3, 5, 7), (4, 5)])
def test_adapter_equals_the_specification_written_out(kernel_sizes: tuple[int, ...]) -> None:
    adapter, frames = build(kernel_sizes), torch.randn(21, 6)
    w, x = adapter.state_dict(), frames
    for i in range(len(kernel_sizes)):
        name = f"subsampler.conv_layers.{i}"
        x = gated_convolution(x, w[f"{name}.weight"], w[f"{name}.bias"])
    inner = x @ w["fc1.weight"].T
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    x = x + inner @ w["fc2.weight"].T
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = x * w["ln.weight"] + w["ln.bias"]
    torch.testing.assert_close(adapter(frames[None])[0], expected, rtol=1e-4, atol=1e-5)


def test_tensors_have_the_published_names_and_widths() -> None:
    shapes = {name: list(t.shape) for name, t in build((5, 3)).state_dict().items()}
    assert shapes == {
        "subsampler.conv_layers.0.weight": [12, 6, 5],
        "subsampler.conv_layers.0.bias": [12],
        "subsampler.conv_layers.1.weight": [16, 6, 3],
        "subsampler.conv_layers.1.bias": [16],
        "fc1.weight": [4, 8],
        "fc2.weight": [8, 4],
        "ln.weight": [8],
        "ln.bias": [8],
    }


@pytest.mark.parametrize("frames, vectors", [(50, 13), (750, 188), (780, 195), (1, 1), (0, 0)])
def test_output_length_follows_the_formula(frames: int, vectors: int) -> None:
    assert build().output_length(frames) == vectors


@given(st.integers(1, 40), st.lists(st.integers(1, 7), min_size=1, max_size=3))
def test_output_has_at_least_the_valid_vectors_for_any_kernel(
    frames: int, kernel_sizes: list[int]
) -> None:
    adapter = build(tuple(kernel_sizes))
    assert adapter(torch.zeros(1, frames, 6)).shape[1] >= adapter.output_length(frames) >= 1


@pytest.mark.parametrize("kernel_sizes", [(), (5, 0)])
def test_kernel_sizes_that_make_no_convolution_are_refused(kernel_sizes: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="conv_kernel_sizes="):
        build(kernel_sizes)
