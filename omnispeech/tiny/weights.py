"""Random weights that keep signals of order one, whatever the size of the network."""

import math
import zlib

import torch
from torch import Tensor, nn

EMBEDDINGS = ("embed_tokens.weight", "input_embedding.weight")
TRANSPOSED = (".ups.", "up_blocks.0.2.")  # convolutions stored [in, out, kernel]
TRANSPOSED_STRIDE = 2  # kernels are twice the stride: so many taps meet at an output
INTO_RESIDUAL = ("o_proj.", "out_proj.", "down_proj.", "fc2.", ".w_2.", ".net.2.", ".convs2.")


def random_weights(module: nn.Module, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """`module` is on meta; the same seed gives the same numbers."""
    return {
        name: random_tensor(name, meta.shape, seed).to(dtype)
        for name, meta in module.state_dict().items()
    }


def random_tensor(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Each tensor has a generator of its own, so that one of another size changes no other."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(shape, generator=generator)
    if name.endswith(".alpha"):
        return 1 + 0.2 * noise
    if name.endswith((".bias", "pos_bias_u", "pos_bias_v")):
        return 0.1 * noise
    if len(shape) == 1:  # the weight of a norm
        return 1 + 0.1 * noise
    return noise * scale(name, shape)


def scale(name: str, shape: torch.Size) -> float:
    if name.endswith(EMBEDDINGS):
        return 1.0
    if name.endswith("embed_positions.weight"):
        return 0.1
    inputs = math.prod(shape[1:])
    if any(part in f".{name}" for part in TRANSPOSED):
        inputs = shape[0] * shape[2] // TRANSPOSED_STRIDE
    residual = 0.5 if any(part in name for part in INTO_RESIDUAL) else 1.0
    return residual / math.sqrt(inputs)
