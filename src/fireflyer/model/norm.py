"""RMSNorm and SwiGLU, each with its own backward: fewer passes over memory than the composed forms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fireflyer.model.deterministic import swiglu_layer
from fireflyer.model.row_tiles import RowTiles


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its root mean square, and what it was multiplied by; fp32."""
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return wide * inverse, inverse


class _RMSNorm(torch.autograd.Function):
    """Keeps the normed rows: the backward then needs one product and one matrix-vector product for both sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = _normed(x, eps)
        ctx.save_for_backward(normed, weight, inverse)
        return normed.to(x.dtype) * weight

    @staticmethod
    @once_differentiable  # a second derivative would take `inverse` for a constant
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        normed, weight, inverse = ctx.saved_tensors
        wide = grad.float()
        product = wide * normed
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        mean = torch.matmul(product, weight.float()).mul_(1 / normed.shape[-1]).unsqueeze(-1)
        grad_x = (wide * weight).addcmul_(normed, mean, value=-1).mul_(inverse)
        return grad_x.to(grad.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last axis, in fp32 whatever the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # the same numbers without autograd's bookkeeping, which a decode step feels
            return _normed(x, self.eps)[0].to(x.dtype) * self.weight
        return _RMSNorm.apply(x, self.weight, self.eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, with gate and up side by side: (..., 2I) in, (..., I) out; the backward keeps only its input."""
    if not torch.is_grad_enabled():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(gate_up)


class SwiGLU(nn.Module):
    """The feed-forward of dense layers and of shared experts: D → 2I → D without biases."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor, tiles: RowTiles | None = None) -> Tensor:
        if tiles is not None:
            return swiglu_layer(x, self.gate_up_proj.weight, self.down_proj.weight, tiles)
        return self.down_proj(swiglu(self.gate_up_proj(x)))
