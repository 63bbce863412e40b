"""Tiles of e4m3 and numbers of e5m6 against tables of every code and a loop over numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fireflyer.numerics.fp8 import quantize_block
from fireflyer.numerics.fp8_tiles import (
    BLOCK,
    COLUMN_TILE,
    ROW_TILE,
    BlockedWeights,
    Tile,
    dequantize_tiles,
    pack_e5m6,
    quantize_tiles,
    turned,
    unpack_e5m6,
)


def magnitudes(exponent_bits: int, mantissa_bits: int, bias: int, count: int) -> Tensor:
    """What the first codes of a format mean, without the sign; float64, ascending."""
    values = []
    for code in range(count):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        assert exponent < 2**exponent_bits
        fraction = mantissa / 2**mantissa_bits
        values.append(fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))
    return torch.tensor(values, dtype=torch.float64)


E4M3 = magnitudes(4, 3, 7, 127)  # the last code is NaN
E5M6 = magnitudes(5, 6, 15, 31 * 64)


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """By comparing with every value; of two as near, the one whose code is even."""
    distance = (x.double().abs().unsqueeze(-1) - table).abs()
    ties = distance == distance.amin(-1, keepdim=True)
    even = torch.arange(len(table)) % 2 == 0
    code = torch.where((ties & even).any(-1), (ties & even).int().argmax(-1), ties.int().argmax(-1))
    return table[code] * x.double().sign()


def by_hand(x: Tensor, tile: Tile, power_of_two: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    scales = torch.ones(-(-rows // tile[0]), -(-columns // tile[1]))
    values = torch.zeros(x.shape, dtype=torch.float64)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * tile[0], (i + 1) * tile[0]), slice(j * tile[1], (j + 1) * tile[1]))
            scale = x[place].abs().max() / 448
            if power_of_two and scale > 0:
                mantissa, exponent = math.frexp(float(scale))
                scale = torch.tensor(2.0 ** (exponent - 1 if mantissa == 0.5 else exponent))
            scales[i, j] = scale if scale > 0 else 1.0
            values[place] = nearest(x[place] / scales[i, j], E4M3)
    return values, scales


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("tile", "shape"), [(ROW_TILE, (5, 300)), (COLUMN_TILE, (260, 7)), (BLOCK, (130, 200))])
def test_every_number_is_the_nearest_of_its_tile(tile: Tile, shape: tuple[int, int], power_of_two: bool):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x * torch.exp2(torch.arange(shape[0]) % 40 - 20.0)[:, None]
    x[:2] = 0
    found = quantize_tiles(x, tile, power_of_two=power_of_two)
    values, scales = by_hand(x, tile, power_of_two)
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.values.double(), values)
    wide = scales.repeat_interleave(tile[0], 0)[: shape[0]].repeat_interleave(tile[1], 1)[:, : shape[1]]
    assert torch.equal(dequantize_tiles(found), values.float() * wide)
    assert torch.equal(dequantize_tiles(found.t()), dequantize_tiles(found).t())


def test_a_matrix_in_many_bands_is_as_one():
    x = torch.randn(700, 1000, generator=torch.Generator().manual_seed(1))
    for tile in (ROW_TILE, COLUMN_TILE, BLOCK):
        whole, part = quantize_tiles(x, tile), quantize_tiles(x[256:512], tile)
        assert torch.equal(whole.rows(256, 512).values.float(), part.values.float())
        assert torch.equal(whole.rows(256, 512).scales, part.scales)
        assert torch.equal(dequantize_tiles(whole)[256:512], dequantize_tiles(part))


def test_what_is_no_number_stays_seen():
    x = torch.ones(3, 256)
    x[0, 5], x[1, 200] = float("nan"), float("inf")
    back = dequantize_tiles(quantize_tiles(x, ROW_TILE))
    assert back[0, :128].isnan().all()
    assert not back[1, 128:].isfinite().all()
    assert torch.equal(back[2], x[2])
    tiny = quantize_tiles(torch.full((1, 128), 1e-40), ROW_TILE)
    assert tiny.values.float().eq(0).all()


def test_turning_loses_nothing_with_powers_of_two():
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    kept = quantize_tiles(x, ROW_TILE, power_of_two=True)
    assert turned(kept).tile == COLUMN_TILE
    assert torch.equal(dequantize_tiles(turned(kept)), dequantize_tiles(kept))
    free = quantize_tiles(x, ROW_TILE)
    assert not torch.equal(
        dequantize_tiles(quantize_tiles(dequantize_tiles(free), COLUMN_TILE)), dequantize_tiles(free)
    )


@pytest.mark.parametrize("rows", [128, 100, 200])
def test_each_matrix_of_a_stack_has_its_own_blocks(rows: int):
    weight = torch.randn(3, 2 * rows, 130, generator=torch.Generator().manual_seed(3))
    blocked = BlockedWeights.quantize(weight, matrices=2)
    for index in range(3):
        found = blocked.of(index)
        values = torch.cat([matrix.values.float() for matrix in found])
        scales = torch.cat([matrix.scales for matrix in found])
        halves = [quantize_block(half) for half in weight[index].split(rows)]
        assert torch.equal(values, torch.cat([half[0].float() for half in halves]))
        assert torch.equal(scales, torch.cat([half[1] for half in halves]))
    assert len(BlockedWeights.quantize(weight[0]).of(0)) == 1


@pytest.mark.parametrize("columns", [1, 129, 256])
def test_e5m6_is_the_nearest_of_twelve_bits(columns: int):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9, columns, generator=generator) * torch.exp2(
        torch.randint(-30, 30, (9, columns), generator=generator)
    )
    x[0] = 0
    x[1] = 1 + 2.0**-7  # a tie, whose even neighbour is 1
    packed = pack_e5m6(x)
    assert packed.packed.shape[1] == 3 * -(-columns // 2)
    for row in range(len(x)):
        for first in range(0, columns, 128):
            tile = x[row, first : first + 128]
            exponent = math.frexp(float(tile.abs().max()))[1] if tile.any() else -99
            factor = 2.0 ** (15 - exponent)
            expected = nearest(tile.double() * factor, E5M6) / factor
            assert torch.equal(unpack_e5m6(packed)[row, first : first + 128].double(), expected)
    assert unpack_e5m6(pack_e5m6(torch.tensor([[float("nan"), 1.0]]))).isnan()[0, 0]
