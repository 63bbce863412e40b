"""Block FP8, the number format of the published V3 weights: e4m3 values with one fp32 scale a block.

In: a matrix (rows, columns) and a block size, 128 x 128 in the published files. Out: the e4m3 matrix and `scale_inv`
(ceil(rows / block rows), ceil(columns / block columns)), or back. `scale_inv` is the factor that one multiplies by,
in spite of its name. Report section 3.3; README_WEIGHTS.md of the V3 repository.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

E4M3_MAX = 448.0
WEIGHT_BLOCK = (128, 128)
HALF_SHIFT = 256.0
"""2^(15 - 7), between the biases of fp16's and e4m3's exponents: what `shifted` values are too small by."""

_BAND = 1 << 17  # numbers worked on at a time
_HALF_BITS = -16512  # fp16's sign, the lower four bits of its exponent, the upper three of its mantissa: 0xbf80
_LARGEST_SHIFTED = 2.0**119  # beyond it a scale times HALF_SHIFT could overflow


def scale_shape(shape: tuple[int, int], block: tuple[int, int] = WEIGHT_BLOCK) -> tuple[int, int]:
    """Shape of the scales of a matrix: both sides rounded up, so kv_a_proj's 576 rows of 7,168 have (5, 56)."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantize_block(
    weight: Tensor, scale_inv: Tensor, block: tuple[int, int] = WEIGHT_BLOCK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Each e4m3 value times its block's scale, multiplied in fp32 and then rounded once to `dtype`.

    weight (R, C) float8_e4m3fn; scale_inv fp32 of `scale_shape`. The blocks at the lower and right borders may be cut
    short. The order of operations is that of the V3 repository's weight_dequant kernel, so the bytes are equal.
    Raises ValueError where the shapes or dtypes don't fit.
    """
    if weight.dim() != 2 or weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"expected a float8_e4m3fn matrix, got {weight.dtype} of shape {tuple(weight.shape)}")
    expected = scale_shape((weight.shape[0], weight.shape[1]), block)
    if tuple(scale_inv.shape) != expected or scale_inv.dtype != torch.float32:
        raise ValueError(
            f"a matrix of {tuple(weight.shape)} in blocks of {block} needs float32 scales of {expected}, "
            f"got {scale_inv.dtype} of {tuple(scale_inv.shape)}"
        )
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out
    as_half = not _has_nan(weight) and bool((scale_inv.abs() < _LARGEST_SHIFTED).all())
    factors = scale_inv * HALF_SHIFT if as_half else scale_inv
    for grid_row, start, stop in _bands(weight.shape, block[0]):
        values = shifted(weight[start:stop]) if as_half else weight[start:stop].float()
        out[start:stop] = values.mul_(_spread(factors[grid_row], weight.shape[1], block[1]))
    return out


def quantize_block(
    weight: Tensor, block: tuple[int, int] = WEIGHT_BLOCK, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """The nearest e4m3 matrix and its scales: the largest magnitude of each block becomes 448.

    weight (R, C), any float dtype; returns (R, C) float8_e4m3fn and fp32 `scale_shape`. Blocks cut short at a border
    count as padded with zeros. A block of zeros gets scale 1. NaN stays NaN and infinity spoils its block, as no scale
    could hold it. Raises ValueError for anything but a float matrix.

    power_of_two: scales rounded up to powers of two, `scale_fmt` ue8m0 of V3.1.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"expected a float matrix, got {weight.dtype} of shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    grid = scale_shape((rows, columns), block)
    largest = torch.zeros(grid[0], grid[1] * block[1], device=weight.device)
    for grid_row, start, stop in _bands(weight.shape, block[0]):
        kept = largest[grid_row, :columns]
        torch.maximum(kept, weight[start:stop].float().abs().amax(dim=0), out=kept)
    scale_inv = largest.view(*grid, block[1]).amax(dim=2) / E4M3_MAX
    if power_of_two:
        scale_inv = power_of_two_above(scale_inv)
    # Zero also where amax is so small that the quotient underflows: 0/0 would make NaN of a harmless block.
    scale_inv = torch.where(scale_inv == 0, torch.ones_like(scale_inv), scale_inv)
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for grid_row, start, stop in _bands(weight.shape, block[0]):
        scaled = weight[start:stop].float() / _spread(scale_inv[grid_row], columns, block[1])
        # A subnormal scale is coarse enough to push the quotient past 448, which e4m3 would turn into NaN.
        quantized[start:stop] = scaled.clamp_(-E4M3_MAX, E4M3_MAX)
    return quantized, scale_inv


def power_of_two_above(scale: Tensor) -> Tensor:
    """The power of two that is the next at or above; what isn't finite or above 0 stays. fp32."""
    mantissa, exponent = torch.frexp(scale)
    rounded_up = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return torch.where(scale.isfinite() & (scale > 0), rounded_up, scale)


def shifted(weight: Tensor) -> Tensor:
    """Finite e4m3 values times 2^-8 in fp32, exactly: e4m3's bits, moved to where fp16 has its own, mean that much.
    Several times as fast as the conversion that torch has."""
    bits = weight.view(torch.int8).to(torch.int16)
    return bits.bitwise_left_shift_(7).bitwise_and_(_HALF_BITS).view(torch.float16).float()


def _bands(shape: torch.Size, height: int) -> Iterator[tuple[int, int, int]]:
    """(row of blocks, first row, end) of bands within one row of blocks, small enough to stay in a core's cache."""
    step = max(1, _BAND // max(1, shape[1]))
    for grid_row in range(-(-shape[0] // height)):
        end = min((grid_row + 1) * height, shape[0])
        for start in range(grid_row * height, end, step):
            yield grid_row, start, min(start + step, end)


def _spread(scales: Tensor, columns: int, width: int) -> Tensor:
    """A row of blocks' scales, one a column."""
    return scales.repeat_interleave(width)[:columns]


def _has_nan(weight: Tensor) -> bool:
    """Whether a value is 0x7f or 0xff, e4m3's two NaN: the largest byte of each signedness."""
    return bool(weight.view(torch.int8).amax() == 127) or bool(weight.view(torch.uint8).amax() == 255)
