"""Layers whose matrix products are FP8, forward and backward, as V3 was trained (report 3.3).

In: a Decoder. Out: the same one, its projections, feed-forwards and experts being the classes below, with the very
parameters that they had. Embedding, head, gate, norms, attention's core and MTP's joint projection stay as they are,
and so does everything without a gradient: what is evaluated and exported are the weights themselves.

What the backward needs is kept in FP8: most inputs by tiles of 128 tokens, ready for the weight's gradient; what
experts are sent, by tokens; SwiGLU's input, from which its output is computed again; and in 12 bits what attention puts
out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fireflyer.model.attention import AttentionInputs, LatentAttention
from fireflyer.model.decoder import Decoder
from fireflyer.model.experts import Experts
from fireflyer.model.norm import SwiGLU, swiglu, swiglu_gradient, weighted_swiglu, weighted_swiglu_gradients
from fireflyer.model.row_tiles import RowTiles
from fireflyer.numerics.fp8_linear import Spans, linear_backward, linear_forward
from fireflyer.numerics.fp8_tiles import (
    BLOCK,
    COLUMN_TILE,
    ROW_TILE,
    BlockedWeights,
    Packed12,
    Tile,
    Tiled,
    dequantize_tiles,
    pack_e5m6,
    quantize_tiles,
    turned,
    unpack_e5m6,
)


class _Linear(torch.autograd.Function):
    """(M, K) by one weight. Of x is kept: 128 x 1 tiles, or what is `kept` already of attention's output."""

    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, weight: Tensor, tile: Tile, matrices: int, kept: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        weights = BlockedWeights.quantize(weight, matrices)
        by_rows = quantize_tiles(x_MK, ROW_TILE, power_of_two=kept is not None)
        if kept is None:
            columns = quantize_tiles(x_MK, COLUMN_TILE)
            kept = (columns.values, columns.scales)
        ctx.save_for_backward(*kept, weights.tiled.values, weights.tiled.scales)
        ctx.weight, ctx.tile, ctx.x_dtype = (weight.shape, weights.rows, weights.matrices), tile, x_MK.dtype
        return linear_forward(by_rows, weights, _whole(x_MK), weight.shape[0]).to(_result_dtype(x_MK))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        first, second, *weight = ctx.saved_tensors
        if first.dtype == torch.uint8:
            wide = unpack_e5m6(Packed12(first, second, ctx.weight[0][-1]))
            columns = quantize_tiles(wide, COLUMN_TILE, power_of_two=True)
        else:
            columns = Tiled(first, second, COLUMN_TILE)
        weights, shape = _weights(ctx.weight, weight)
        grad_x, grad_weight = linear_backward(
            grads[0], weights, shape, _whole(grads[0]), lambda *_: columns, gradient_tile=ctx.tile
        )
        return grad_x.to(ctx.x_dtype), grad_weight, None, None, None


class _ExpertsUp(torch.autograd.Function):
    """Gate and up projections of rows in expert order; x is kept as it was sent: FP8 by tokens, powers of two."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_EJD: Tensor, ends_E: Tensor, tile: Tile) -> Tensor:
        weights = BlockedWeights.quantize(weight_EJD, matrices=2)
        sent = quantize_tiles(x_MD, ROW_TILE, power_of_two=True)
        ctx.save_for_backward(sent.values, sent.scales, ends_E, weights.tiled.values, weights.tiled.scales)
        ctx.weight, ctx.tile, ctx.x_dtype = (weight_EJD.shape, weights.rows, weights.matrices), tile, x_MD.dtype
        return linear_forward(sent, weights, _spans(ends_E), weight_EJD.shape[1]).to(_result_dtype(x_MD))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        values, scales, ends_E, *weight = ctx.saved_tensors
        sent = Tiled(values, scales, ROW_TILE)
        weights, shape = _weights(ctx.weight, weight)
        grad_x, grad_weight = linear_backward(
            grads[0],
            weights,
            shape,
            _spans(ends_E),
            lambda start, stop: turned(sent.rows(start, stop)),
            gradient_tile=ctx.tile,
        )
        return grad_x.to(ctx.x_dtype), grad_weight, None, None


class _SwigluDown(torch.autograd.Function):
    """SwiGLU and the down projection after it: of all, only SwiGLU's input is kept.

    With `weight_M` and `ends_E` for experts, whose gradient is sent in FP8 by powers of two; without for one weight.
    """

    @staticmethod
    def forward(
        ctx: Any, gate_up_MJ: Tensor, weight_M: Tensor | None, down: Tensor, ends_E: Tensor | None, tile: Tile
    ) -> Tensor:
        weights, kept = BlockedWeights.quantize(down), quantize_tiles(gate_up_MJ, ROW_TILE)
        ctx.save_for_backward(kept.values, kept.scales, weight_M, ends_E, weights.tiled.values, weights.tiled.scales)
        ctx.weight, ctx.tile, ctx.x_dtype = (down.shape, weights.rows, weights.matrices), tile, gate_up_MJ.dtype
        hidden_MI = swiglu(gate_up_MJ) if weight_M is None else weighted_swiglu(gate_up_MJ, weight_M)
        spans = _whole(gate_up_MJ) if ends_E is None else _spans(ends_E)
        out_MD = linear_forward(quantize_tiles(hidden_MI, ROW_TILE), weights, spans, down.shape[-2])
        return out_MD.to(_result_dtype(gate_up_MJ))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        values, scales, weight_M, ends_E, *weight = ctx.saved_tensors
        gate_up_MJ = dequantize_tiles(Tiled(values, scales, ROW_TILE))
        hidden_MI = swiglu(gate_up_MJ) if weight_M is None else weighted_swiglu(gate_up_MJ, weight_M.float())
        weights, shape = _weights(ctx.weight, weight)
        grad_MI, grad_down = linear_backward(
            grads[0],
            weights,
            shape,
            _whole(gate_up_MJ) if ends_E is None else _spans(ends_E),
            lambda start, stop: quantize_tiles(hidden_MI[start:stop], COLUMN_TILE),
            gradient_tile=ctx.tile,
            dispatched=ends_E is not None,
        )
        if weight_M is None:
            return swiglu_gradient(grad_MI, gate_up_MJ).to(ctx.x_dtype), None, grad_down, None, None
        grad_gate_up, grad_weight_M = weighted_swiglu_gradients(grad_MI, gate_up_MJ, weight_M.float())
        return grad_gate_up.to(ctx.x_dtype), grad_weight_M.to(weight_M.dtype), grad_down, None, None


class _Core(torch.autograd.Function):
    """Attention by torch's kernel for CPUs, whose output is kept for its backward in e5m6 instead of whole.

    Returns the heads side by side (B, T, H*V), and the two tensors that are kept of it, for the layer that follows.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask_BTS: Tensor | None, scale: float, value: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        bias = None
        if mask_BTS is not None:
            bias = torch.zeros_like(mask_BTS, dtype=q.dtype).masked_fill_(~mask_BTS, float("-inf"))[:, None]
        out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask_BTS is None, attn_mask=bias, scale=scale
        )
        joined_BTX = out[..., :value].transpose(1, 2).flatten(2)
        kept = pack_e5m6(joined_BTX.flatten(0, 1))
        ctx.save_for_backward(q, k, v, bias, log_sums, kept.packed, kept.exponents)
        ctx.scale, ctx.value = scale, value
        ctx.mark_non_differentiable(kept.packed, kept.exponents)
        return joined_BTX, kept.packed, kept.exponents

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, bias, log_sums, packed, exponents = ctx.saved_tensors
        batch, heads, tokens, width = q.shape

        def of_heads(joined: Tensor) -> Tensor:
            each = joined.view(batch, tokens, heads, ctx.value)
            return F.pad(each, (0, width - ctx.value)).to(q.dtype).transpose(1, 2)

        out = of_heads(unpack_e5m6(Packed12(packed, exponents, heads * ctx.value)))
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            of_heads(grads[0]), q, k, v, out, log_sums, 0.0, bias is None, attn_mask=bias, scale=ctx.scale
        )
        return grad_q, grad_k, grad_v, None, None, None


class Fp8Linear(nn.Linear):
    """A projection; `matrices` lie below one another in its weight."""

    gradient_tile: Tile = ROW_TILE
    matrices = 1

    def forward(self, input: Tensor, kept: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """kept: `Packed12`'s tensors of the input, where it is in that form that the input is kept."""
        if not torch.is_grad_enabled():
            return super().forward(input)
        rows = input.flatten(0, -2)
        out = _Linear.apply(rows, self.weight, self.gradient_tile, self.matrices, kept)
        return out.unflatten(0, input.shape[:-1])


class Fp8SwiGLU(SwiGLU):
    """The feed-forward of dense layers and of shared experts."""

    def forward(self, x: Tensor, tiles: RowTiles | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x, tiles)
        gate_up, down = self.gate_up_proj(x).flatten(0, -2), self.down_proj
        out = _SwigluDown.apply(gate_up, None, down.weight, None, down.gradient_tile)
        return out.unflatten(0, x.shape[:-1])


class Fp8Experts(Experts):
    """Routed experts. Their weights' tiles of 128 tokens begin with each expert's first."""

    gradient_tile: Tile = ROW_TILE

    def feed_forward(self, x_MD: Tensor, weight_M: Tensor, ends_E: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().feed_forward(x_MD, weight_M, ends_E)
        gate_up_MJ = _ExpertsUp.apply(x_MD, self.gate_up_proj, ends_E, self.gradient_tile)
        weight_M = weight_M.to(gate_up_MJ.dtype)
        return _SwigluDown.apply(gate_up_MJ, weight_M, self.down_proj, ends_E, self.gradient_tile)


class Fp8Attention(LatentAttention):
    """Latent attention, its core as it was; what it puts out is kept once, in 12 bits, for the core and for o_proj.

    On a card the core's kernel keeps its own output beside that.
    """

    def forward(self, x_BTD: Tensor, inputs: AttentionInputs, layer_index: int) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x_BTD, inputs, layer_index)
        (group,) = inputs.groups
        q_nope_BTHP, q_rope_BTHR, kv_latent_BSL, rope_key_BSR = self.rows(x_BTD, inputs)
        if group.cache is not None:  # other ranks' tokens
            latent_BTC = torch.cat((kv_latent_BSL, rope_key_BSR), dim=-1)
            kept_BSC = group.cache.extend(layer_index, latent_BTC, group.positions_BT, group.num_slots)
            kv_latent_BSL, rope_key_BSR = kept_BSC.split((self.latent, self.rope), dim=-1)
        q, k, v = self.heads(q_nope_BTHP, q_rope_BTHR, kv_latent_BSL, rope_key_BSR)
        if q.device.type == "cpu":
            out_BTX, *kept = _Core.apply(q, k, v, group.mask_BTS, self.scale, self.value)
        else:
            out_BTX = self.joined(self.core(q, k, v, group.mask_BTS))
            packed = pack_e5m6(out_BTX.detach().flatten(0, 1))
            kept = [packed.packed, packed.exponents]
        return self.o_proj(out_BTX, tuple(kept))


def use_fp8(model: Decoder, gradient_tile: Tile = ROW_TILE) -> None:
    """Turn a model's projections, feed-forwards and experts into those above, in place; parameters stay what they are.

    gradient_tile: see `linear_backward`.
    """
    blocks = [*model.model.layers, *(module.block for module in model.model.mtp)]
    for module in [module for block in blocks for module in block.modules()]:
        # Classes change as FSDP2 changes them: each has the fields of the one that it takes the place of.
        if type(module) is nn.Linear:
            module.__class__ = Fp8Linear
        elif type(module) is SwiGLU:
            module.__class__ = Fp8SwiGLU
        elif type(module) is Experts:
            module.__class__ = Fp8Experts
        elif type(module) is LatentAttention:
            module.__class__ = Fp8Attention
        if isinstance(module, (Fp8Linear, Fp8Experts)):
            module.gradient_tile = gradient_tile
    for module in model.modules():
        if isinstance(module, Fp8SwiGLU):
            assert isinstance(module.gate_up_proj, Fp8Linear)
            module.gate_up_proj.matrices = 2


def _result_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer would give under the caller's autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _whole(x: Tensor) -> Spans:
    return [(0, x.shape[0])]


def _spans(ends_E: Tensor) -> Spans:
    ends = ends_E.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _weights(described: tuple[torch.Size, int, int], saved: list[Tensor]) -> tuple[BlockedWeights, torch.Size]:
    shape, rows, matrices = described
    return BlockedWeights(Tiled(saved[0], saved[1], BLOCK), rows, matrices), shape
