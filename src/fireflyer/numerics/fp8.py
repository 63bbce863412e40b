"""Block FP8, the number format of the published V3 weights: e4m3 values with one fp32 scale a block.

In: a matrix (rows, columns) and a block size, 128 x 128 in the published files. Out: the e4m3 matrix and `scale_inv`
(ceil(rows / block rows), ceil(columns / block columns)), or back. `scale_inv` is the factor that one multiplies by,
in spite of its name. Report section 3.3; README_WEIGHTS.md of the V3 repository.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
WEIGHT_BLOCK = (128, 128)


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
    return weight.float().mul_(_per_element(scale_inv, weight.shape, block)).to(dtype)


def quantize_block(weight: Tensor, block: tuple[int, int] = WEIGHT_BLOCK) -> tuple[Tensor, Tensor]:
    """The nearest e4m3 matrix and its scales: the largest magnitude of each block becomes 448.

    weight (R, C), any float dtype; returns (R, C) float8_e4m3fn and fp32 `scale_shape`. Blocks cut short at a border
    count as padded with zeros. A block of zeros gets scale 1. NaN stays NaN and infinity spoils its block, as no scale
    could hold it. Raises ValueError for anything but a float matrix.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"expected a float matrix, got {weight.dtype} of shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    grid_rows, grid_columns = scale_shape((rows, columns), block)
    padding = (0, grid_columns * block[1] - columns, 0, grid_rows * block[0] - rows)
    padded = torch.nn.functional.pad(weight.float(), padding)
    amax = padded.abs().unflatten(0, (grid_rows, block[0])).unflatten(2, (grid_columns, block[1])).amax(dim=(1, 3))
    scale_inv = amax / E4M3_MAX
    # Zero also where amax is so small that the quotient underflows: 0/0 would make NaN of a harmless block.
    scale_inv = torch.where(scale_inv == 0, torch.ones_like(scale_inv), scale_inv)
    scaled = weight.float() / _per_element(scale_inv, weight.shape, block)
    # A subnormal scale is coarse enough to push the quotient past 448, which e4m3 would turn into NaN.
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale_inv


def _per_element(scale_inv: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Each block's scale spread over the block, cut to the matrix's own shape."""
    spread = scale_inv.repeat_interleave(block[1], dim=1)[:, : shape[1]]
    return spread.repeat_interleave(block[0], dim=0)[: shape[0]]
