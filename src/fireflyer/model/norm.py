"""RMSNorm and SwiGLU, each with its own backward: fewer passes over memory than the composed forms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fireflyer.model.deterministic import exact_swiglu
from fireflyer.model.row_tiles import RowTiles, linear


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32; in fp64 as it is, so that a model in fp64 computes in it all through."""
    return x if x.dtype == torch.float64 else x.float()


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its root mean square, and what it was multiplied by; fp32."""
    wide = at_least_fp32(x)
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return wide * inverse, inverse


class _RMSNorm(torch.autograd.Function):
    """Its backward is layer norm's own kernel told that the mean is 0, plus the one term in which the two differ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = _normed(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed.mul_(weight) if normed.dtype == x.dtype else normed.to(x.dtype) * weight

    @staticmethod
    @once_differentiable  # a second derivative would take `inverse` for a constant
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        x, weight, inverse = ctx.saved_tensors
        width = [x.shape[-1]]
        wide, wide_weight = grad.to(inverse.dtype).contiguous(), weight.to(inverse.dtype)
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            wide, x.to(inverse.dtype), width, torch.zeros_like(inverse), inverse, wide_weight, None, [True, True, False]
        )
        # Layer norm also takes off the mean of the gradient, since it has taken off the mean of x; this gives it back.
        mean = torch.matmul(wide, wide_weight).mul_(1 / width[0]).unsqueeze(-1)
        return grad_x.add_(mean.mul_(inverse)).to(grad.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last axis, in fp32 at least whatever the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # the same numbers without autograd's bookkeeping, which a decode step feels
            normed = _normed(x, self.eps)[0].to(x.dtype)
            return normed.mul_(self.weight) if normed.dtype == self.weight.dtype else normed * self.weight
        return _RMSNorm.apply(x, self.weight, self.eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return swiglu_gradient(grads[0], *ctx.saved_tensors)


def swiglu_gradient(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of `swiglu`'s input by that of its result."""
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


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_MJ: Tensor, weight_M: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_MJ, weight_M)
        gate, up = gate_up_MJ.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(weight_M[:, None])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor]:
        return weighted_swiglu_gradients(grads[0], *ctx.saved_tensors)


def weighted_swiglu_gradients(grad: Tensor, gate_up_MJ: Tensor, weight_M: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `weighted_swiglu`'s inputs by that of its result."""
    gate, up = gate_up_MJ.chunk(2, dim=-1)
    grad_gate_up = torch.empty_like(gate_up_MJ)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    by_up = grad * up
    silu = F.silu(gate)
    grad_weight_M = torch.bmm(by_up[:, None], silu[:, :, None])[:, 0, 0]
    torch.ops.aten.silu_backward.grad_input(by_up.mul_(weight_M[:, None]), gate, grad_input=grad_gate)
    torch.mul(silu.mul_(weight_M[:, None]), grad, out=grad_up)
    return grad_gate_up, grad_weight_M


def weighted_swiglu(gate_up_MJ: Tensor, weight_M: Tensor) -> Tensor:
    """silu(gate) · up · weight, one weight a row: (M, 2I) and (M,) in, (M, I) out; the backward keeps only its inputs.

    What comes out of the matrix product after it is weighted too, and only the narrow rows were touched.
    """
    if not torch.is_grad_enabled():
        gate, up = gate_up_MJ.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(weight_M[:, None])
    return _WeightedSwiGLU.apply(gate_up_MJ, weight_M)


class SwiGLU(nn.Module):
    """The feed-forward of dense layers and of shared experts: D → 2I → D without biases."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor, tiles: RowTiles | None = None) -> Tensor:
        gate_up = linear(self.gate_up_proj, x, tiles)
        return linear(self.down_proj, swiglu(gate_up) if tiles is None else exact_swiglu(gate_up), tiles)
