"""DeepSeekMoE (report 2.1.2): routed experts chosen by the gate, beside shared experts that see every token.

Tokens are sorted by expert, so that every expert's work is one matrix product over neighbouring rows, and come back by
gathering. Both moves are gathers in the backward too: scattering with accumulation is slow on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fireflyer.config import ModelConfig
from fireflyer.model.deterministic import routed_experts
from fireflyer.model.norm import SwiGLU, swiglu, weighted_swiglu
from fireflyer.model.packed_experts import PackedExperts
from fireflyer.model.routing import expert_counts, gate_logits, route
from fireflyer.model.row_tiles import RowTiles
from fireflyer.model.stored_experts import FEW_TOKENS, StoredExperts


@dataclass(frozen=True)
class Routing:
    """What one MoE layer decided; the balance loss, the bias update and every report read it."""

    layer_index: int
    scores_NE: Tensor
    """(N, E) fp32 unbiased affinities, with gradient; rows in (batch, token) order."""
    indices_NK: Tensor
    """(N, K) int64 chosen experts."""
    shape_BT: tuple[int, int]


class _Dispatch(torch.autograd.Function):
    """Rows of tokens, (N, D), repeated into expert order, (M, D)."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_of_M: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(place_NK)
        return x_ND.index_select(0, token_of_M)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        (place_NK,) = ctx.saved_tensors
        return F.embedding_bag(place_NK, grads[0], mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """The sum of each token's rows: (M, D) in expert order to (N, D)."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, token_of_M: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_M)
        return F.embedding_bag(place_NK, y_MD, mode="sum")  # gathers and adds in one pass

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        (token_of_M,) = ctx.saved_tensors
        return grads[0].index_select(0, token_of_M), None, None


def grouped_linear(x_MD: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> Tensor:
    """x · Wᵀ where rows up to `ends_E[e]` (int32, cumulative) belong to expert e: (M, D) by (E, O, D) gives (M, O)."""
    device = x_MD.device.type
    if torch.is_autocast_enabled(device):  # which knows linear layers, but not grouped_mm
        dtype = torch.get_autocast_dtype(device)
        x_MD, weight_EOD = x_MD.to(dtype), weight_EOD.to(dtype)
    if _has_grouped_mm(x_MD, weight_EOD):
        return F.grouped_mm(x_MD, weight_EOD.transpose(1, 2), offs=ends_E)
    parts, start = [], 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            parts.append(F.linear(x_MD[start:end], weight_EOD[expert]))
        start = end
    return torch.cat(parts) if parts else x_MD.new_empty(0, weight_EOD.shape[1])


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether one call serves all experts: no fp64, every row a multiple of 16 bytes, and a GPU does bf16 alone."""
    if x.dtype == torch.float64:
        return False
    aligned = all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    return aligned and x.shape[0] >= weight.shape[0] and (x.device.type == "cpu" or x.dtype == torch.bfloat16)


class Experts(nn.Module):
    """The routed experts of one layer, stacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.num_experts = num
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, width))

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, tiles: RowTiles | None = None) -> Tensor:
        if tiles is not None:
            return routed_experts(x_ND, indices_NK, weights_NK, self.gate_up_proj, self.down_proj, tiles)
        if 0 < x_ND.shape[0] <= FEW_TOKENS and x_ND.device.type == "cpu" and not torch.is_grad_enabled():
            tokens = zip(x_ND.split(1), indices_NK.tolist(), weights_NK.split(1), strict=True)
            return torch.cat([self._one_token(*token) for token in tokens])
        return self.sorted_by_expert(x_ND, indices_NK, weights_NK)

    def sorted_by_expert(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """The way for many tokens, and for gradients: two matrix products for all experts."""
        order_M = indices_NK.flatten().argsort(stable=True)
        place_NK = torch.empty_like(order_M)
        place_NK[order_M] = torch.arange(order_M.numel(), device=order_M.device)
        place_NK = place_NK.view(indices_NK.shape)
        token_of_M = order_M // indices_NK.shape[1]
        ends_E = expert_counts(indices_NK, self.num_experts).cumsum(0).to(torch.int32)
        weight_M = weights_NK.flatten().gather(0, order_M)
        y_MD = self.feed_forward(_Dispatch.apply(x_ND, token_of_M, place_NK), weight_M, ends_E)
        return _Combine.apply(y_MD, token_of_M, place_NK)

    def feed_forward(self, x_MD: Tensor, weight_M: Tensor, ends_E: Tensor) -> Tensor:
        """weight · expert(x) of rows in the order of their experts, (M, D) to (M, D); `ends_E`: as `grouped_linear`."""
        gate_up_MJ = self.up(x_MD, ends_E)
        return self.down(weighted_swiglu(gate_up_MJ, weight_M.to(gate_up_MJ.dtype)), ends_E)

    def up(self, x_MD: Tensor, ends_E: Tensor) -> Tensor:
        """Gate and up projections of rows in the order of their experts."""
        return grouped_linear(x_MD, self.gate_up_proj, ends_E)

    def down(self, x_MI: Tensor, ends_E: Tensor) -> Tensor:
        """Their down projections."""
        return grouped_linear(x_MI, self.down_proj, ends_E)

    def _one_token(self, x_1D: Tensor, experts: list[int], weights_1K: Tensor) -> Tensor:
        """Decoding, or verifying a draft: the chosen experts one by one, a third of the time that sorting takes."""
        hidden_KI = swiglu(torch.cat([F.linear(x_1D, self.gate_up_proj[expert]) for expert in experts]))
        y_KD = torch.cat([F.linear(hidden_KI[k : k + 1], self.down_proj[expert]) for k, expert in enumerate(experts)])
        return weights_1K.to(y_KD.dtype) @ y_KD


class Gate(nn.Module):
    """The router's weight, and for V3 the bias that balances the experts: fp32 whatever the model is cast to."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        has_bias = config.topk_method == "noaux_tc"
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if has_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias is not None:
            moved = self.e_score_correction_bias
            # Through bf16 and back other experts would win: take the exact values, only the device from the move.
            self.e_score_correction_bias = (
                moved.to(torch.float32) if bias.is_meta else bias.to(device=moved.device, dtype=torch.float32)
            )
        return self


class MoE(nn.Module):
    """The feed-forward of a sparse layer: Σ gate · expert(x) over the chosen, plus the shared experts, ungated."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        self.gate = Gate(config)
        self.experts: Experts | PackedExperts | StoredExperts = Experts(config)
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
            if config.n_shared_experts
            else None
        )

    def forward(
        self, x_BTD: Tensor, tiles: RowTiles | None = None, forced_NK: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """tiles, forced_NK: as `route` takes them."""
        shape_BT = (x_BTD.shape[0], x_BTD.shape[1])
        x_ND = x_BTD.flatten(0, 1)
        logits_NE = gate_logits(x_ND, self.gate.weight, tiles)
        bias_E = self.gate.e_score_correction_bias
        indices_NK, weights_NK, scores_NE = route(logits_NE, bias_E, self.config, tiles, forced_NK)
        y_BTD = self.experts(x_ND, indices_NK, weights_NK, tiles).view_as(x_BTD)
        if self.shared_experts is not None:
            y_BTD = y_BTD + self.shared_experts(x_BTD, tiles)
        return y_BTD, Routing(self.layer_index, scores_NE, indices_NK, shape_BT)
