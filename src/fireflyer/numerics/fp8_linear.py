"""The three products of linear layers in FP8: result, input's gradient, weight's gradient (report 3.3.1, 3.3.2).

In: rows of tokens, and a stack of weights, each of which has its own run of rows: experts, or one weight for all. The
operands of every product are tiled along the axis that it sums over: 1 x 128 of tokens by weights in 128 x 128 blocks,
and for the weight's gradient 128 x 1 by 128 x 1, which begin anew with each weight's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fireflyer.numerics.fp8_matmul import fp8_product
from fireflyer.numerics.fp8_tiles import (
    BLOCK,
    COLUMN_TILE,
    ROW_TILE,
    BlockedWeights,
    Tile,
    Tiled,
    quantize_tiles,
    turned,
)

Spans = Sequence[tuple[int, int]]
"""(first row, end) of each weight's rows, in order."""


def linear_forward(x: Tiled, weights: BlockedWeights, spans: Spans, num_outputs: int) -> Tensor:
    """x · Wᵀ, each row by its weight: 1 x 128 tiles of (M, K) to (M, N), fp32 (bf16 on a card)."""
    if len(spans) == 1 and len(weights.of(0)) == 1:
        return fp8_product(x, weights.of(0)[0])
    parts = [[fp8_product(x.rows(*span), matrix) for matrix in weights.of(i)] for i, span in _filled(spans)]
    rows = [torch.cat(matrices, dim=1) if len(matrices) > 1 else matrices[0] for matrices in parts]
    return torch.cat(rows) if rows else torch.zeros(0, num_outputs, device=x.values.device)


def linear_backward(
    grad_MN: Tensor,
    weights: BlockedWeights,
    weight_shape: torch.Size,
    spans: Spans,
    columns_of: Callable[[int, int], Tiled],
    *,
    gradient_tile: Tile = ROW_TILE,
    dispatched: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (M, K) and of the weights (E, N, K) or (N, K), the latter in fp32.

    Args:
        columns_of: (first row, end) to those rows of x in 128 x 1 tiles.
        gradient_tile: 128 x 128 is what the report tried and found to diverge (its appendix B.2): one quantised form of
            the gradient for both products.
        dispatched: the gradient arrives as FP8, by powers of two (report 3.3.3), and the weights' is of that.
    """
    num_inputs = weight_shape[-1]
    grad_x = grad_MN.new_empty(grad_MN.shape[0], num_inputs, dtype=torch.float32)
    grad_weight = grad_MN.new_zeros(len(spans), weight_shape[-2], num_inputs, dtype=torch.float32)
    for index, (start, stop) in _filled(spans):
        inputs, first = columns_of(start, stop), 0
        for matrix in weights.of(index):
            last = first + matrix.values.shape[0]
            own = grad_MN[start:stop, first:last]
            by_rows = quantize_tiles(own, gradient_tile, power_of_two=dispatched)
            by_columns = by_rows if gradient_tile == BLOCK else turned(by_rows) if dispatched else None
            by_columns = quantize_tiles(own, COLUMN_TILE) if by_columns is None else by_columns
            product = fp8_product(by_rows, matrix.t())
            grad_x[start:stop] = product if first == 0 else grad_x[start:stop] + product
            grad_weight[index, first:last] = fp8_product(by_columns.t(), inputs.t())
            first = last
    return grad_x, grad_weight.view(weight_shape)


def _filled(spans: Spans) -> list[tuple[int, tuple[int, int]]]:
    """The spans that have rows, with their numbers."""
    return [(index, span) for index, span in enumerate(spans) if span[1] > span[0]]
