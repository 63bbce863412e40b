"""Multi-head latent attention (report 2.1.1): hidden states in, hidden states out, in two forms that agree to rounding.

Expanded: the latent is expanded to keys and values per head; for training and long prefill.
Absorbed: the expansion is moved onto the query and the output, so that attention runs on the latent itself and nothing
but the cached C numbers per token is read; for decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fireflyer.config import LATENT_NORM_EPS, ModelConfig
from fireflyer.model.cache import LatentStore
from fireflyer.model.deterministic import attend_in_tiles
from fireflyer.model.norm import RMSNorm
from fireflyer.model.rope import apply_rope, pair_factors, softmax_scale, turn_pairs
from fireflyer.model.row_tiles import RowTiles, linear

Form = Literal["expanded", "absorbed"]


@dataclass(frozen=True)
class AttentionGroup:
    """Rows of a call that attend alike: B sequences with T tokens each. All layers share it."""

    positions_BT: Tensor
    mask_BTS: Tensor | None
    """True where a query may look; None is plain causal over the group's own tokens, or no limit for a single token."""
    cache: LatentStore | None
    num_slots: int
    form: Form


@dataclass(frozen=True)
class AttentionInputs:
    """What all layers of one call share.

    An ordinary call is one group of its own shape. An engine's call is (1, N, D): the rows of its groups, one after the
    other, so that projections, feed-forward and experts see all tokens at once whatever sequence they belong to.
    """

    cos_BTR: Tensor
    sin_BTR: Tensor
    groups: tuple[AttentionGroup, ...]
    tiles: RowTiles | None = None
    """Where given, no token's result depends on the tokens beside it; attention is then absorbed, whatever the form."""
    forced_experts: Mapping[int, Tensor] = field(default_factory=dict)
    """By MoE layer, (B·T, K): the experts to take instead of the gate's choice, see `route`."""

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """For `turn_pairs`; made once for all layers."""
        return pair_factors(self.cos_BTR, self.sin_BTR)

    def turn(self, x: Tensor, *, heads: bool) -> Tensor:
        """Rotate (B, T, R), or with heads (B, T, H, R), by its rows' positions."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            cos, sin = self.cos_BTR, self.sin_BTR
            return apply_rope(x, cos[:, :, None], sin[:, :, None]) if heads else apply_rope(x, cos, sin)
        own, neighbour, place_R = self.factors
        return turn_pairs(x, own[:, :, None], neighbour[:, :, None], place_R) if heads else turn_pairs(x, *self.factors)


class LatentAttention(nn.Module):
    """MLA of one layer; weights in the published layout (rows per head: [nope | rope] for q, [nope | v] for kv_b)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent = config.kv_lora_rank
        self.scale = softmax_scale(config)
        q_rows = self.num_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, q_rows, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_rows, bias=False)
        self.has_q_latent = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.latent, self.num_heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.value, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, inputs: AttentionInputs, layer_index: int) -> Tensor:
        rows = self.rows(x_BTD, inputs)
        if len(inputs.groups) == 1 and inputs.groups[0].positions_BT.shape == x_BTD.shape[:2]:
            return linear(self.o_proj, self._attend(*rows, inputs.groups[0], layer_index, inputs.tiles), inputs.tiles)
        parts, start = [], 0
        for group in inputs.groups:
            shape = group.positions_BT.shape
            stop = start + shape.numel()
            own = (tensor.flatten(0, 1)[start:stop].unflatten(0, shape) for tensor in rows)
            parts.append(self._attend(*own, group, layer_index, inputs.tiles).flatten(0, 1))
            start = stop
        return linear(self.o_proj, torch.cat(parts).view(*x_BTD.shape[:2], -1), inputs.tiles)

    def rows(self, x_BTD: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each token: queries (B, T, H, P) and (B, T, H, R), normed latent (B, T, L) and turned key (B, T, R)."""
        q_nope_BTHP, q_rope_BTHR = self._queries(x_BTD, inputs)
        kv_BTC = linear(self.kv_a_proj_with_mqa, x_BTD, inputs.tiles)
        kv_latent_BTL, rope_key_BTR = kv_BTC.split((self.latent, self.rope), dim=-1)
        return q_nope_BTHP, q_rope_BTHR, self.kv_a_layernorm(kv_latent_BTL), inputs.turn(rope_key_BTR, heads=False)

    def _attend(
        self,
        q_nope_BTHP: Tensor,
        q_rope_BTHR: Tensor,
        kv_latent_BTL: Tensor,
        rope_key_BTR: Tensor,
        group: AttentionGroup,
        layer_index: int,
        tiles: RowTiles | None,
    ) -> Tensor:
        """One group: what the heads have read, side by side, (B, T, H*V)."""
        if group.cache is not None:
            latent_BTC = torch.cat((kv_latent_BTL, rope_key_BTR), dim=-1)
            kept_BSC = group.cache.extend(layer_index, latent_BTC, group.positions_BT, group.num_slots)
            kept_BSC = kept_BSC.to(q_nope_BTHP.dtype)
            if tiles is not None:
                return self._in_tiles(q_nope_BTHP, q_rope_BTHR, kept_BSC, group.positions_BT, tiles)
            if group.form == "absorbed":
                return self._absorbed(q_nope_BTHP, q_rope_BTHR, kept_BSC, group.mask_BTS)
            kv_latent_BTL, rope_key_BTR = kept_BSC.split((self.latent, self.rope), dim=-1)
        elif tiles is not None or group.form == "absorbed":
            kept_BSC = torch.cat((kv_latent_BTL, rope_key_BTR), dim=-1)
            if tiles is not None:
                own_T = torch.arange(kept_BSC.shape[1], device=kept_BSC.device)
                return self._in_tiles(q_nope_BTHP, q_rope_BTHR, kept_BSC, own_T.expand(kept_BSC.shape[:2]), tiles)
            return self._absorbed(q_nope_BTHP, q_rope_BTHR, kept_BSC, group.mask_BTS)
        return self._expanded(q_nope_BTHP, q_rope_BTHR, kv_latent_BTL, rope_key_BTR, group.mask_BTS)

    def _queries(self, x_BTD: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        if self.has_q_latent:
            q_latent = self.q_a_layernorm(linear(self.q_a_proj, x_BTD, inputs.tiles))
            q = linear(self.q_b_proj, q_latent, inputs.tiles)
        else:
            q = linear(self.q_proj, x_BTD, inputs.tiles)
        q_BTHQ = q.unflatten(-1, (self.num_heads, self.nope + self.rope))
        q_nope_BTHP, q_rope_BTHR = q_BTHQ.split((self.nope, self.rope), dim=-1)
        return q_nope_BTHP, inputs.turn(q_rope_BTHR, heads=True)

    def _expanded(
        self, q_nope_BTHP: Tensor, q_rope_BTHR: Tensor, kv_latent_BSL: Tensor, rope_key_BSR: Tensor, mask: Tensor | None
    ) -> Tensor:
        q, k, v = self.heads(q_nope_BTHP, q_rope_BTHR, kv_latent_BSL, rope_key_BSR)
        return self.joined(self.core(q, k, v, mask))

    def heads(
        self, q_nope_BTHP: Tensor, q_rope_BTHR: Tensor, kv_latent_BSL: Tensor, rope_key_BSR: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, each (B, H, T or S, W): filled up with zeros to one width."""
        kv_BSHX = self.kv_b_proj(kv_latent_BSL).unflatten(-1, (self.num_heads, self.nope + self.value))
        k_nope_BSHP, v_BSHV = kv_BSHX.split((self.nope, self.value), dim=-1)
        rope_key_BSHR = rope_key_BSR[:, :, None].expand(-1, -1, self.num_heads, -1)
        q = torch.cat((q_nope_BTHP, q_rope_BTHR), dim=-1).transpose(1, 2)
        k = torch.cat((k_nope_BSHP, rope_key_BSHR), dim=-1).transpose(1, 2)
        v = v_BSHV.transpose(1, 2)
        # Equal widths keep scaled_dot_product_attention on its fast path: 4.3 times on a CPU. Zeros change nothing.
        width = max(self.nope + self.rope, self.value)
        q, k, v = (F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
        return q, k, v

    def core(self, q: Tensor, k: Tensor, v: Tensor, mask_BTS: Tensor | None) -> Tensor:
        """What each head reads, (B, H, T, W)."""
        mask, causal = None if mask_BTS is None else mask_BTS[:, None], mask_BTS is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale)

    def joined(self, out_BHTW: Tensor) -> Tensor:
        """The heads side by side, (B, T, H*V)."""
        return out_BHTW[..., : self.value].transpose(1, 2).flatten(2)

    def _absorbed(self, q_nope_BTHP: Tensor, q_rope_BTHR: Tensor, kept_BSC: Tensor, mask_BTS: Tensor | None) -> Tensor:
        batch, tokens = q_nope_BTHP.shape[:2]
        up_key_HPL, up_value_HVL = self._up(q_nope_BTHP.dtype)
        q_latent_HNL = torch.bmm(q_nope_BTHP.flatten(0, 1).transpose(0, 1), up_key_HPL)
        q_latent_BTHL = q_latent_HNL.transpose(0, 1).unflatten(0, (batch, tokens))
        q_BXC = torch.cat((q_latent_BTHL, q_rope_BTHR), dim=-1).flatten(1, 2)
        scores_BXS = torch.bmm(q_BXC, kept_BSC.transpose(1, 2)).mul_(self.scale)
        if mask_BTS is None and tokens > 1:
            mask_BTS = causal_mask(tokens, q_BXC.device)[None]
        if mask_BTS is not None:
            scores_BTHS = scores_BXS.unflatten(1, (tokens, self.num_heads))
            scores_BXS = scores_BTHS.masked_fill(~mask_BTS[:, :, None], float("-inf")).flatten(1, 2)
        weights_BXS = scores_BXS.softmax(-1, dtype=torch.float32).to(q_BXC.dtype)
        out_BXL = torch.bmm(weights_BXS, kept_BSC[..., : self.latent])
        out_HNL = out_BXL.unflatten(1, (tokens, self.num_heads)).flatten(0, 1).transpose(0, 1)
        out_HNV = torch.bmm(out_HNL, up_value_HVL.transpose(1, 2))
        return out_HNV.transpose(0, 1).flatten(1).unflatten(0, (batch, tokens))

    def _up(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The latent's expansion to keys and to values, per head."""
        up_HXL = self.kv_b_proj.weight.to(dtype).unflatten(0, (self.num_heads, self.nope + self.value))
        up_key_HPL, up_value_HVL = up_HXL.split((self.nope, self.value), dim=1)
        return up_key_HPL, up_value_HVL

    def _in_tiles(
        self, q_nope_BTHP: Tensor, q_rope_BTHR: Tensor, kept_BSC: Tensor, last_BT: Tensor, tiles: RowTiles
    ) -> Tensor:
        """`_absorbed` where no query's result depends on the others; `last_BT`: the last slot that each sees."""
        up_key_HPL, up_value_HVL = self._up(q_nope_BTHP.dtype)
        q_HNL = tiles.heads(q_nope_BTHP.flatten(0, 1).transpose(0, 1), up_key_HPL)
        q_latent_BTHL = q_HNL.transpose(0, 1).unflatten(0, last_BT.shape)
        q_BTHC = torch.cat((q_latent_BTHL, q_rope_BTHR), dim=-1)
        out_BTHL = attend_in_tiles(q_BTHC, kept_BSC, last_BT, self.latent, self.scale, tiles)
        out_HNL = out_BTHL.flatten(0, 1).transpose(0, 1)
        out_HNV = tiles.heads(out_HNL, up_value_HVL.transpose(1, 2))
        return out_HNV.transpose(0, 1).flatten(1).unflatten(0, last_BT.shape)


def causal_mask(tokens: int, device: torch.device) -> Tensor:
    """(T, T) bool: True at and below the diagonal."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
