"""Linear layers whose weights are packed: fp32 rows in, fp32 rows out, a fourth or an eighth of the bytes to read.

A packed matrix is one block of bytes (see `integer`); a layer holds it as a buffer, so that it may lie in a file.
For inference on a CPU: nothing here has a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fireflyer.numerics.integer import Kind, PackedShape, integer_linear, integers
from fireflyer.numerics.native.library import Matrix, library, packed_matrix


def packed_linear(x: Tensor, packed: Tensor, shape: PackedShape) -> Tensor:
    """x · Wᵀ: (M, cols) fp32 to (M, rows) fp32, each row of it a function of that row of x alone, to the bit."""
    kernels = library()
    if kernels is not None:
        return kernels.linear(x, packed_matrix(packed, shape))
    return integer_linear(x, *integers(packed, shape))


class PackedLinear(nn.Module):
    """y = x · Wᵀ; `packed` (1, bytes) uint8 is unset until it is loaded."""

    packed: Tensor

    def __init__(self, rows: int, cols: int, kind: Kind) -> None:
        super().__init__()
        self.shape = PackedShape(kind, rows, cols)
        self.register_buffer("packed", torch.empty(1, self.shape.num_bytes, dtype=torch.uint8))

    def matrix(self) -> Matrix:
        """The kernels' description of the weight, good as long as it lives."""
        return packed_matrix(self.packed[0], self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x.flatten(0, -2), self.packed[0], self.shape).unflatten(0, x.shape[:-1])


class NarrowLinear(nn.Linear):
    """Weights kept in bf16, sums in the dtype of x."""

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__(cols, rows, bias=False, dtype=torch.bfloat16)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))
