"""Products whose rows don't depend on the rows beside them. In: matrices of any height. Out: the same bits for a row,
alone or among others.

A matrix product sums over its inner axis in an order that the library picks by the shape: a row has other last bits at
1 than at 64 rows. So products run here at heights that were seen to agree: at first use of a shape, a row goes through
a product of that shape at each height, and a height counts when the row comes out at every place as at the reference
height. Any number of rows is then cut into such heights; what the last one lacks is filled with zeros.

The order of a sum doesn't depend on the numbers, so a probe chooses them: terms that cancel in pairs, and nothing is
left but the rounding of the order taken. The order may depend on the machine and on the number of threads, and so may
the results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fireflyer.errors import UserError

HEIGHTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_REFERENCES = (16, 64, 256, 8, 4, 2, 1)
"""From 16 rows on most heights agree; small matrices in bf16 take another path up to a number of multiplications."""
_BATCHES = (1, 2, 4, 16, 64)
_BATCH_ROWS = 2048
_PROBED_NUMBERS = 64
"""Results compared at each place. Where the order differs, most of them do."""
_PROBE_WORK = 2**33
"""Multiplications of one probe at most: large weights gain little from more height."""

Key = tuple[object, ...]


class RowTiles:
    """Remembers the heights that agree; one for an engine. `kv_tile`: cache slots that attention takes together."""

    def __init__(self, kv_tile: int = 128) -> None:
        self.kv_tile = kv_tile
        self._heights: dict[Key, tuple[int, ...]] = {}

    def linear(self, x: Tensor, weight_NK: Tensor) -> Tensor:
        """x · Wᵀ, each row of it a function of that row of x alone: (..., K) to (..., N)."""
        key = ("linear", weight_NK.shape, weight_NK.stride(), x.dtype, torch.get_num_threads())
        heights = self._heights.get(key)
        if heights is None:
            self._heights[key] = heights = _agreeing_with_weight(weight_NK)
        result_MN = _in_pieces(lambda rows: F.linear(rows, weight_NK), heights, x.reshape(-1, x.shape[-1]))
        return result_MN.view(*x.shape[:-1], weight_NK.shape[0])

    def heads(self, x_HMK: Tensor, weight_HKN: Tensor) -> Tensor:
        """torch.bmm with a weight for each head, each row of it a function of that row of x alone, whatever M."""
        key = ("heads", weight_HKN.shape, weight_HKN.stride(), x_HMK.dtype, torch.get_num_threads())
        heights = self._heights.get(key)
        if heights is None:
            self._heights[key] = heights = _agreeing_with_heads(weight_HKN)
        return _in_pieces(lambda rows: torch.bmm(rows, weight_HKN), heights, x_HMK)

    def bmm(self, a_BMK: Tensor, b_BKN: Tensor) -> Tensor:
        """torch.bmm, each row of it a function of that row of `a` and its matrix of `b`, whatever B and M."""
        key = ("bmm", b_BKN.shape[1:], b_BKN.stride()[1:], a_BMK.dtype, torch.get_num_threads())
        heights = self._heights.get(key)
        if heights is None:
            self._heights[key] = heights = _agreeing_in_any_batch(b_BKN)
        return _in_pieces(lambda a: torch.bmm(a, b_BKN), heights, a_BMK)


def linear(layer: nn.Module, x: Tensor, tiles: RowTiles | None) -> Tensor:
    """`layer(x)`, in tiles where there are any; a packed layer needs none, as its sums are of whole numbers."""
    return tiles.linear(x, layer.weight) if tiles is not None and isinstance(layer, nn.Linear) else layer(x)


def _agreeing_with_weight(weight_NK: Tensor) -> tuple[int, ...]:
    """Heights for linear layers of this layout."""
    return _agreeing(lambda row, matrix, height: [F.linear(row.repeat(height, 1), matrix.t())], weight_NK.t())


def _agreeing_with_heads(weight_HKN: Tensor) -> tuple[int, ...]:
    """Heights for products by a weight for each head."""
    heads = weight_HKN.shape[0]

    def products(row_K: Tensor, matrix_KN: Tensor, height: int) -> list[Tensor]:
        return [torch.bmm(row_K.repeat(heads, height, 1), _copies(matrix_KN, heads))]

    return _agreeing(products, weight_HKN[0])


def _agreeing_in_any_batch(b_BKN: Tensor) -> tuple[int, ...]:
    """Heights for batched products by matrices of this layout, where the number of batches varies."""

    def products(row_K: Tensor, matrix_KN: Tensor, height: int) -> list[Tensor]:
        batches = [n for n in _BATCHES if n <= 2 or n * height <= _BATCH_ROWS]
        copies_BKN = _copies(matrix_KN, max(batches))
        return [torch.bmm(row_K.repeat(n, height, 1), copies_BKN[:n]) for n in batches]

    return _agreeing(products, b_BKN[0])


def _agreeing(products: Callable[[Tensor, Tensor, int], list[Tensor]], like_KN: Tensor) -> tuple[int, ...]:
    """The heights at which a row has the same bits at every place.

    Args:
        products: a row (K,), a matrix (K, N) and a height to products of that many equal rows by the matrix.
        like_KN: layout of the matrix.
    """
    probes = [_cancelling(like_KN, seed) for seed in range(-(-_PROBED_NUMBERS // like_KN.shape[1]))]
    for reference in _REFERENCES:
        expected = [products(*probe, reference)[0].flatten(0, -2)[0] for probe in probes]
        heights = tuple(
            height
            for height in HEIGHTS
            if (height <= reference or height * like_KN.numel() <= _PROBE_WORK)
            and all(
                torch.equal(result, row.expand_as(result))
                for probe, row in zip(probes, expected, strict=True)
                for result in products(*probe, height)
            )
        )
        if reference in heights:
            return heights
    raise UserError(
        f"deterministic=True is not possible here: products by a matrix of {tuple(like_KN.shape)} in {like_KN.dtype} "
        "depend on their place; use another dtype, or deterministic=False"
    )


def _cancelling(like_KN: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A row (K,) and a matrix (K, N) of this layout whose products cancel in pairs, far apart and of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    inner, width = like_KN.shape
    order = torch.randperm(inner, generator=generator)
    half = inner // 2
    row_K = torch.zeros(inner)
    values_KN = torch.zeros(inner, width)
    for side, sign in ((order[:half], 1), (order[half : 2 * half], -1)):
        again = torch.Generator().manual_seed(seed)
        row_K[side] = torch.randn(half, generator=again).exp2_().mul_(torch.randn(half, generator=again))
        values_KN[side] = torch.randn(half, width, generator=again).mul_(sign)
    matrix_KN = torch.empty_strided(like_KN.shape, like_KN.stride(), dtype=like_KN.dtype, device=like_KN.device)
    return row_K.to(like_KN), matrix_KN.copy_(values_KN)


def _copies(matrix_KN: Tensor, times: int) -> Tensor:
    """(times, K, N), each a matrix of its own memory, with the strides of the one."""
    extent = sum((size - 1) * stride for size, stride in zip(matrix_KN.shape, matrix_KN.stride(), strict=True)) + 1
    copies_BKN = matrix_KN.new_zeros(times * extent).as_strided(
        (times, *matrix_KN.shape), (extent, *matrix_KN.stride())
    )
    return copies_BKN.copy_(matrix_KN)


def _in_pieces(product: Callable[[Tensor], Tensor], heights: tuple[int, ...], x_XMK: Tensor) -> Tensor:
    """The product at the given heights, its parts joined. Contiguous operands, as the probes were."""
    num_rows = left = x_XMK.shape[-2]
    pieces: list[int] = []
    while left > 0:
        pieces.append(_next_height(left, heights))
        left -= pieces[-1]
    x_XMK = F.pad(x_XMK, (0, 0, 0, -left)) if left else x_XMK.contiguous()
    if len(pieces) <= 1:
        result = product(x_XMK)
    else:
        result = torch.cat([product(part.contiguous()) for part in x_XMK.split(pieces, dim=-2)], dim=-2)
    return result.narrow(-2, 0, num_rows) if left else result


def _next_height(num_rows: int, heights: tuple[int, ...]) -> int:
    """The first height that holds all rows, unless a fourth of it would be filling; then the largest full one."""
    for index, height in enumerate(heights):
        if height >= num_rows:
            return height if index == 0 or (height - num_rows) * 4 <= height else heights[index - 1]
    return heights[-1]
