"""What FP8 training keeps numbers in (report 3.3): e4m3 in tiles of one scale each, and e5m6 of 12 bits.

In: a matrix of activations or gradients, (rows, columns), or a stack of weights; the tile: 1 x 128 along the axis that
a product sums over, 128 x 128 for weights. Out: `Tiled`, and back. Scales are taken online, from the matrix itself.
Where a matrix is later tiled the other way, its scales are powers of two: then e4m3's mantissas stay what they are, but
for numbers that are subnormal by one of the two scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fireflyer.numerics.fp8 import E4M3_MAX, HALF_SHIFT, power_of_two_above, shifted

TILE = 128
ROW_TILE, COLUMN_TILE, BLOCK = (1, TILE), (TILE, 1), (TILE, TILE)
Tile = tuple[int, int]

_BAND = 1 << 17  # numbers worked on at a time: what stays in a core's cache
_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Tiled:
    """values (R, C) float8_e4m3fn; scales fp32 (⌈R / tile rows⌉, ⌈C / tile columns⌉), which one multiplies by."""

    values: Tensor
    scales: Tensor
    tile: Tile

    def rows(self, start: int, stop: int) -> Tiled:
        """Some of the rows, as a view; `start` is where a tile begins, and `stop` too, or else where a tile is cut."""
        return Tiled(self.values[start:stop], self.scales[start // self.tile[0] : -(-stop // self.tile[0])], self.tile)

    def t(self) -> Tiled:
        """Transposed, as a view."""
        return Tiled(self.values.t(), self.scales.t(), (self.tile[1], self.tile[0]))


def quantize_tiles(x_RC: Tensor, tile: Tile, *, power_of_two: bool = False) -> Tiled:
    """The nearest e4m3 numbers, each tile's largest magnitude becoming 448 (or, by a power of two, at least 224).

    x_RC: any float dtype, read as fp32. Tiles at the borders may be cut short. A tile of zeros has scale 1, and one so
    small that its scale would be subnormal becomes zeros. NaN or infinity makes NaN of its tile. Report 3.3.2.
    """
    rows, columns = x_RC.shape
    grid_columns = -(-columns // tile[1])
    values = torch.empty(x_RC.shape, dtype=torch.float8_e4m3fn, device=x_RC.device)
    scales = torch.empty(-(-rows // tile[0]), grid_columns, device=x_RC.device)
    for start, stop in _bands(rows, columns, tile[0], x_RC.device):
        band = _in_tiles(x_RC[start:stop].float(), tile)
        scale = band.abs()
        for axis in (1, 3):
            if band.shape[axis] > 1:
                scale = scale.amax(axis, keepdim=True)
        scale = scale / E4M3_MAX
        if power_of_two:
            scale = power_of_two_above(scale)
        scale = scale.masked_fill_(scale < _SMALLEST, 1.0)
        values[start:stop] = (band / scale).view(-1, grid_columns * tile[1])[: stop - start, :columns]
        scales[start // tile[0] : -(-stop // tile[0])] = scale[:, 0, :, 0]
    return Tiled(values, scales, tile)


def dequantize_tiles(tiled: Tiled) -> Tensor:
    """fp32 (R, C): each value times its tile's scale."""
    if not tiled.values.is_contiguous() and tiled.values.t().is_contiguous():
        return dequantize_tiles(tiled.t()).t()
    (rows, columns), tile = tiled.values.shape, tiled.tile
    out = torch.empty(rows, columns, device=tiled.values.device)
    for start, stop in _bands(rows, columns, tile[0], out.device):
        band = _in_tiles(shifted(tiled.values[start:stop]), tile)  # NaN are in the scales too
        scale = tiled.scales[start // tile[0] : -(-stop // tile[0])] * HALF_SHIFT
        if columns % tile[1] or (stop - start) % tile[0]:
            wide = band * scale[:, None, :, None]
            out[start:stop] = wide.view(-1, band.shape[2] * tile[1])[: stop - start, :columns]
        else:
            torch.mul(band, scale[:, None, :, None], out=_in_tiles(out[start:stop], tile))
    return out


def turned(tiled: Tiled) -> Tiled:
    """1 x 128 tiles as 128 x 1, as the backward needs a kept activation; scales are powers of two, as they must be."""
    return quantize_tiles(dequantize_tiles(tiled), (tiled.tile[1], tiled.tile[0]), power_of_two=True)


class BlockedWeights:
    """A stack of weights (E, R, C), or one, in 128 x 128 blocks: `tiled` has all rows below one another.

    Gate and up projection are two `matrices` in one weight, and blocks begin anew with each, as in the published files.
    Matrices whose rows are no whole blocks are filled up with zeros, which `of` leaves out.
    """

    def __init__(self, tiled: Tiled, rows: int, matrices: int) -> None:
        self.tiled, self.rows, self.matrices = tiled, rows, matrices

    @staticmethod
    def quantize(weight: Tensor, matrices: int = 1) -> BlockedWeights:
        """weight (E, R, C) or (R, C), any float dtype."""
        rows, columns = weight.shape[-2] // matrices, weight.shape[-1]
        if rows % TILE == 0:
            return BlockedWeights(quantize_tiles(weight.reshape(-1, columns), BLOCK), rows * matrices, 1)
        padded = F.pad(weight.reshape(-1, rows, columns), (0, 0, 0, -rows % TILE))
        return BlockedWeights(quantize_tiles(padded.flatten(0, 1), BLOCK), rows, matrices)

    def of(self, index: int) -> list[Tiled]:
        """The matrices of one weight in the order of its rows; aligned ones are one."""
        step = self.rows + -self.rows % TILE
        first = index * self.matrices * step
        return [self.tiled.rows(at, at + self.rows) for at in range(first, first + self.matrices * step, step)]


@dataclass(frozen=True)
class Packed12:
    """A matrix in e5m6: `packed` uint8 (R, ⌈1.5 C⌉), three bytes for two numbers; exponents int8 of 1 x 128 tiles."""

    packed: Tensor
    exponents: Tensor
    columns: int


def pack_e5m6(x_RC: Tensor) -> Packed12:
    """The nearest numbers of one sign, five exponent and six mantissa bits, by a power of two for each 1 x 128 tile.

    The report's format for what attention puts out, which attention's own backward reads again (3.3.3). Ties go to
    even; numbers under 2^-29 of their tile's largest lose bits, as e5m6's subnormals do. NaN and infinity stay.
    """
    columns = x_RC.shape[1]
    tiles = _in_tiles(x_RC.float(), ROW_TILE)[:, 0]
    exponents = torch.frexp(tiles.abs().amax(-1).clamp_(2.0**-100, 2.0**100))[1]
    scaled = tiles * torch.exp2((15 - exponents).float())[..., None]
    # Adding a number whose last bit is worth what e5m6's last bit is worth at x rounds x to that, and then it's exact.
    magic = (scaled.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**-14).mul_(1.5 * 2.0**17)
    rounded = (scaled + magic).sub_(magic).flatten(1)[:, : columns + columns % 2]
    # What is left are fp16's numbers with four last bits of zero: twelve bits say all.
    codes = (F.pad(rounded, (0, rounded.shape[1] % 2)).half().view(torch.int16) >> 4) & 0xFFF
    first, second = codes.view(codes.shape[0], -1, 2).unbind(-1)
    packed = torch.stack((first & 0xFF, (first >> 8) | ((second & 0xF) << 4), second >> 4), dim=-1)
    return Packed12(packed.to(torch.uint8).flatten(1), exponents.to(torch.int8), columns)


def unpack_e5m6(kept: Packed12) -> Tensor:
    """fp32 (R, C), exactly what the codes mean."""
    low, middle, high = kept.packed.view(kept.packed.shape[0], -1, 3).to(torch.int16).unbind(-1)
    codes = torch.stack((low | ((middle & 0xF) << 8), (middle >> 4) | (high << 4)), dim=-1).flatten(1)
    half = (codes[:, : kept.columns] << 4).view(torch.float16).float()
    scales = torch.exp2((kept.exponents - 15).float())
    return (_in_tiles(half, ROW_TILE)[:, 0] * scales[..., None]).flatten(1)[:, : kept.columns]


def _bands(rows: int, columns: int, height: int, device: torch.device) -> list[tuple[int, int]]:
    """(first row, end) of bands of whole tiles; on a GPU one band."""
    step = rows if device.type != "cpu" else max(1, _BAND // max(1, columns * height)) * height
    return list(pairwise([*range(0, rows, max(1, step)), rows])) if rows else []


def _in_tiles(band: Tensor, tile: Tile) -> Tensor:
    """(rows of tiles, tile rows, columns of tiles, tile columns); what a tile lacks is filled with zeros."""
    rows, columns = band.shape
    if rows % tile[0] or columns % tile[1]:
        band = F.pad(band, (0, -columns % tile[1], 0, -rows % tile[0]))
    return band.view(band.shape[0] // tile[0], tile[0], -1, tile[1])
