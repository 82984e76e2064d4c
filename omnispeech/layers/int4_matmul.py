"""4-bit weights through torch's own int4 kernels, on CPU and CUDA (spec: quantization 4.2).

The kernels compute (code - 8) * scale + offset in bfloat16, so a zero point z becomes
offset = (8 - z) * scale. How they want codes to lie depends on the processor: it is learned by
packing a probe, because large batches dequantize from the packed form, the only one kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnispeech.layers.packing import QuantizedWeight, join_fields, split_fields
from omnispeech.layers.quantized_weight import Form

GROUP_SIZES = (256, 128, 64, 32)  # that the kernels take
ROWS_AT_ONCE = 1024  # while packing: the kernels' packers want four bytes for each code

# Batches above are dequantized and multiplied. CPU: measured, 4096 x 12288 on one core of an EPYC
# 9004 breaks even between 50 and 64 rows. CUDA: spec 4.2, where the kernel stops winning.
LARGE_BATCH = {"cpu": 56, "cuda": 16}

Packer = Callable[[Tensor], Tensor]  # [N, K] uint8 codes -> the kernel's form


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """A packed weight is rows x columns tiles one behind the other, each packed in one order."""

    rows: int
    columns: int
    order: Tensor  # [rows * columns] which code of the tile, row by row, each nibble holds

    def codes(self, packed: Tensor, n: int, k: int) -> Tensor:
        """[N, K] uint8."""
        tiles = split_fields(packed, 4).view(n // self.rows, k // self.columns, -1)
        tiles = tiles[..., self.order.argsort()].view(*tiles.shape[:2], self.rows, self.columns)
        return tiles.transpose(1, 2).reshape(n, k)

    def pack(self, codes: Tensor) -> Tensor:
        """Inverse of `codes` for tiles of one column: three times faster than torch's packer."""
        low, high = self.order.view(-1, 2).unbind(1)
        tiles = codes.view(-1, self.rows, codes.shape[1])
        packed = codes.new_empty(len(tiles), codes.shape[1], self.rows // 2)
        for tile, out in zip(tiles, packed, strict=True):  # one by one: they stay in the cache
            out.copy_((tile[low] | (tile[high] << 4)).t())
        return packed.view(len(codes), -1)


class Int4Matmul(nn.Module):
    """x [T, K] -> [T, N] in the dtype of x, computed in bfloat16."""

    name = "torch int4"
    packed: Tensor
    scale_offset: Tensor  # [G, N, 2] bfloat16

    def __init__(self, weight: QuantizedWeight, device: torch.device) -> None:
        """For a weight that `obstacle` has nothing against."""
        super().__init__()
        columns = weight.codes.shape[1]
        tile = find_tile(device, columns)
        assert tile is not None, device
        group = columns // weight.scales.shape[1]
        group_size = next(size for size in GROUP_SIZES if group % size == 0)
        pack = tile.pack if tile.columns == 1 else _packer(device, tile.columns)
        parts = torch.split(_whole_tiles(weight.codes, tile.rows), ROWS_AT_ONCE)
        packed = torch.cat([pack(part.to(device)) for part in parts])
        pairs = _whole_tiles(_scale_offset(weight), tile.rows).to(device)  # [N, G, 2]
        pairs = pairs.repeat_interleave(group // group_size, dim=1)
        buffers = {"packed": packed, "scale_offset": pairs.transpose(0, 1).contiguous()}
        self._hold(Form.of(weight), buffers, tile)

    @classmethod
    def restore(cls, form: Form, buffers: Mapping[str, Tensor]) -> "Int4Matmul":
        """From the buffers of one that was built on such a device."""
        matmul = cls.__new__(cls)
        nn.Module.__init__(matmul)
        tile = find_tile(buffers["packed"].device, form.columns)
        assert tile is not None, buffers["packed"].device
        matmul._hold(form, buffers, tile)
        return matmul

    def _hold(self, form: Form, buffers: Mapping[str, Tensor], tile: Tile) -> None:
        self.rows, self.columns, self.tile = form.rows, form.columns, tile
        self.register_buffer("packed", buffers["packed"], persistent=False)
        self.register_buffer("scale_offset", buffers["scale_offset"], persistent=False)
        self.group_size = self.columns // len(self.scale_offset)

    def forward(self, x: Tensor) -> Tensor:
        half = x.to(torch.bfloat16).contiguous()
        if len(x) <= LARGE_BATCH[x.device.type]:
            y = _multiply(half, self.packed, self.group_size, self.scale_offset)
        elif self.tile.columns == 1:
            y = self._multiply_tiles(half)
        else:
            y = F.linear(half, self.dequantize(torch.bfloat16))
        return y[:, : self.rows].to(x.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] with scales and offsets as the kernel has them, rounded to bfloat16."""
        groups, padded, _ = self.scale_offset.shape
        codes = self.tile.codes(self.packed, padded, self.columns)[: self.rows]
        centred = codes.sub_(8).view(torch.int8).view(self.rows, groups, -1).to(dtype)
        scale, offset = self.scale_offset[:, : self.rows].to(dtype).transpose(0, 1).unbind(-1)
        torch.addcmul(offset[..., None], centred, scale[..., None], out=centred)
        return centred.view(self.rows, self.columns)

    def _multiply_tiles(self, x: Tensor) -> Tensor:
        """[T, N] of a large batch, four tiles at a time: they stay in the processor's cache.

        Weights are never brought into their order, the few outputs are.
        """
        rows = self.tile.rows
        order = torch.cat([self.tile.order[0::2], self.tile.order[1::2]])  # low nibbles, then high
        packed = self.packed.view(-1, self.columns, rows // 2)
        pairs = self.scale_offset.view(-1, len(packed), rows, 2)[:, :, order]  # [G, tiles, rows, 2]
        y = x.new_empty(len(packed), len(x), rows)
        room = x.new_empty(4, self.columns, rows)
        for start in range(0, len(packed), 4):
            share = slice(start, start + 4)
            tiles = _expand(packed[share], pairs[:, share], room)
            for weights, out in zip(tiles, y[share], strict=True):
                torch.mm(x, weights, out=out)
        return y[..., order.argsort()].transpose(0, 1).reshape(len(x), -1)


def _expand(packed: Tensor, pairs: Tensor, room: Tensor) -> Tensor:
    """[tiles, K, rows / 2] bytes, [G, tiles, rows, 2] -> [tiles, K, rows] bfloat16 in `room`."""
    tiles, _, half = packed.shape
    weights = room[:tiles]
    weights[..., :half] = (packed & 15).sub_(8).view(torch.int8)
    weights[..., half:] = (packed >> 4).sub_(8).view(torch.int8)
    scale, offset = pairs.permute(3, 1, 0, 2)[:, :, :, None].contiguous()  # [tiles, G, 1, rows]
    grouped = weights.view(tiles, len(pairs), -1, 2 * half)
    torch.addcmul(offset, grouped, scale, out=grouped)
    return weights


def obstacle(weight: QuantizedWeight, device: torch.device) -> str | None:
    """Why torch's kernel cannot compute this 4-bit weight there, if so."""
    columns, groups = weight.codes.shape[1], weight.scales.shape[1]
    if weight.group_of is not None:
        return "its groups differ in size"
    if columns % groups or columns // groups % min(GROUP_SIZES):
        return f"groups of {columns // groups} columns are no multiple of {min(GROUP_SIZES)}"
    if find_tile(device, columns) is None:
        return f"torch's int4 kernel does not work on {device}"
    return None


def find_tile(device: torch.device, columns: int) -> Tile | None:
    """How the kernel lays out a weight of so many columns; None if it does not work there."""
    if device.type == "cpu":
        # tiles of 64 rows with AVX512, 32 with AVX2
        shapes = [(64, 1), (32, 1), (16, 1)]
    elif device.type == "cuda":
        shapes = [(8, size) for size in (128, 64, 32) if columns % size == 0]
    else:
        return None
    tiles = (_learn_on(device, rows, size) for rows, size in shapes)
    return next((tile for tile in tiles if tile), None)


def tile_orders(device: torch.device) -> bytes:
    """All that the packed form depends on there: equal where `restore` gives the same layer."""
    tiles = [find_tile(device, columns) for columns in (32, 64, 128)]
    return repr(
        [tile and (tile.rows, tile.columns, tile.order.tolist()) for tile in tiles]
    ).encode()


@lru_cache
def _learn_on(device: torch.device, rows: int, columns: int) -> Tile | None:
    pack = _packer(device, columns)
    try:
        tile = learn_tile(pack, rows, columns, device)
        return tile if tile and _multiplies(pack, tile, device) else None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # no kernel for this device, or not for this generation of it
        return None


def learn_tile(pack: Packer, rows: int, columns: int, device: torch.device) -> Tile | None:
    """The order inside tiles of that shape; None if `pack` makes no such tiles.

    Packs the digits of each code's index, so that every nibble tells where it is from.
    """
    size = rows * columns
    index = torch.arange(size, device=device)
    order = torch.zeros_like(index)
    for shift in range(0, (size - 1).bit_length(), 4):
        digit = (index >> shift & 15).to(torch.uint8).view(rows, columns)
        fields = split_fields(pack(torch.cat([digit, digit], dim=1)), 4).flatten()
        order |= fields[:size].long() << shift
    if not torch.equal(order.sort().values, index):
        return None
    tile = Tile(rows, columns, order)
    probe = _random_codes(3 * rows, 4 * columns).to(device)
    packed = pack(probe)
    if columns == 1 and not torch.equal(tile.pack(probe), packed):
        return None
    return tile if torch.equal(tile.codes(packed, *probe.shape), probe) else None


def _multiplies(pack: Packer, tile: Tile, device: torch.device) -> bool:
    """Whether the kernel computes what it is said to, on numbers that bfloat16 holds exactly."""
    n, k = 3 * tile.rows, max(64, 2 * tile.columns)
    codes = _random_codes(n, k).to(device)
    pairs = (_random_codes(k // 32, 2 * n).to(device, torch.bfloat16) / 4).view(-1, n, 2)
    x = torch.eye(k, dtype=torch.bfloat16, device=device)
    scale, offset = pairs.repeat_interleave(32, dim=0).float().unbind(-1)  # [K, N]
    expected = (codes.t().float() - 8) * scale + offset
    y = _multiply(x, pack(codes), 32, pairs)
    return torch.equal(y, expected.to(torch.bfloat16))


def _random_codes(n: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(16, (n, k), generator=generator, dtype=torch.uint8)


def _packer(device: torch.device, tile_columns: int) -> Packer:
    if device.type == "cpu":
        return lambda codes: torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)

    def pack(codes: Tensor) -> Tensor:
        swapped = (
            codes.view(len(codes), -1, 2).flip(2).flatten(1)
        )  # the even column is the high one
        joined = join_fields(swapped, 4, torch.uint8)
        return torch.ops.aten._convert_weight_to_int4pack(joined, tile_columns // 16)

    return pack


def _multiply(x: Tensor, packed: Tensor, group_size: int, scale_offset: Tensor) -> Tensor:
    aten = torch.ops.aten
    kernel = (
        aten._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else aten._weight_int4pack_mm
    )
    return kernel(x, packed, group_size, scale_offset)


def _scale_offset(weight: QuantizedWeight) -> Tensor:
    """[N, G, 2] bfloat16."""
    scales = weight.scales.float()
    return torch.stack([scales, (8 - weight.zeros.float()) * scales], dim=-1).bfloat16()


def _whole_tiles(rows: Tensor, multiple: int) -> Tensor:
    """Zeros below, up to a multiple of so many rows."""
    missing = -len(rows) % multiple
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
