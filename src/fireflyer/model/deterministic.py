"""Arithmetic whose result for a token doesn't depend on what is computed beside it: bit-equal alone and in a crowd.

Products run through `RowTiles`. Here is the rest: attention over fixed tiles of the cache, the sum over the chosen
experts, and activations without torch's own sigmoid, whose last elements of an array take another path than the others.
Slower than the plain forms, for inference only.

Shapes: B sequences, T tokens, N = B·T, H heads, C = L + R cached numbers per slot, K chosen experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fireflyer.model.row_tiles import RowTiles

_BLOCK_ROWS = 512
"""Query rows (a row is one head of one token) that attention takes at a time."""
_BLOCK_NUMBERS = 2**24
"""Partial results that one block may hold."""


def exact_sigmoid(x: Tensor) -> Tensor:
    """Sigmoid, fp32: the same for an element whatever the array around it."""
    return (-x.float()).exp().add_(1).reciprocal_()


def exact_swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up: (..., 2I) to (..., I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (gate.float() * exact_sigmoid(gate)).to(up.dtype) * up


def attend_in_tiles(
    q_BTHC: Tensor, kept_BSC: Tensor, last_BT: Tensor, latent: int, scale: float, tiles: RowTiles
) -> Tensor:
    """Absorbed attention, tile of slots after tile: (B, T, H, L).

    The maximum of a row is exact in any order; numerators and denominators are summed inside a tile by one product of
    fixed shape, and over the tiles from the first on. A tile that a query doesn't see adds zero, so it doesn't matter
    how many slots the cache has handed out.

    Args:
        q_BTHC: queries, [latent | rope].
        kept_BSC: latents and rope keys; slot j holds position j.
        last_BT: the last slot that each query sees.
        latent: L, the part of C that is read out.
        scale: of the scores.
    """
    short = -kept_BSC.shape[1] % tiles.kv_tile
    if short:
        kept_BSC = F.pad(kept_BSC, (0, 0, 0, short))
    batch, tokens, heads = q_BTHC.shape[:3]
    kept_BJSC = kept_BSC.unflatten(1, (-1, tiles.kv_tile))
    step_T = max(_BLOCK_ROWS // heads, 1)
    numbers = kept_BSC.shape[1] // tiles.kv_tile * min(tokens, step_T) * heads * (latent + tiles.kv_tile)
    step_B = max(_BLOCK_NUMBERS // numbers, 1)
    out_BTHL = q_BTHC.new_empty(batch, tokens, heads, latent)
    for b in range(0, batch, step_B):
        for t in range(0, tokens, step_T):
            block = (slice(b, b + step_B), slice(t, t + step_T))
            num_tiles = int(last_BT[block].max()) // tiles.kv_tile + 1
            kept = kept_BJSC[b : b + step_B, :num_tiles]
            out_BTHL[block] = _attend_block(q_BTHC[block], kept, last_BT[block], latent, scale, tiles)
    return out_BTHL


def _attend_block(
    q_BTHC: Tensor, kept_BJSC: Tensor, last_BT: Tensor, latent: int, scale: float, tiles: RowTiles
) -> Tensor:
    """`attend_in_tiles` of a few queries over J tiles of S slots."""
    batch, num_tiles, tile = kept_BJSC.shape[:3]
    tokens, heads = q_BTHC.shape[1:3]
    kept_XSC = kept_BJSC.flatten(0, 1)
    q_XMC = q_BTHC.flatten(1, 2)[:, None].expand(-1, num_tiles, -1, -1).flatten(0, 1)
    scores_XMS = tiles.bmm(q_XMC, kept_XSC.transpose(1, 2)).float().mul_(scale)
    slots_JS = torch.arange(num_tiles * tile, device=last_BT.device).view(num_tiles, tile)
    hidden_BJTS = slots_JS[:, None] > last_BT[:, None, :, None]
    scores_BJTHS = scores_XMS.view(batch, num_tiles, tokens, heads, tile)
    scores_BJTHS = scores_BJTHS.masked_fill_(hidden_BJTS[:, :, :, None], float("-inf"))
    weights_BJTHS = scores_BJTHS.sub_(scores_BJTHS.amax((1, 4), keepdim=True)).exp_()
    sums_BJTH = weights_BJTHS.sum(-1)
    weights_XMS = weights_BJTHS.view(batch * num_tiles, tokens * heads, tile).to(q_BTHC.dtype)
    read_XML = tiles.bmm(weights_XMS, kept_XSC[..., :latent]).float()
    read_BJTHL = read_XML.view(batch, num_tiles, tokens, heads, latent)
    sum_BTH, read_BTHL = sums_BJTH[:, 0], read_BJTHL[:, 0]
    for j in range(1, num_tiles):
        sum_BTH.add_(sums_BJTH[:, j])
        read_BTHL.add_(read_BJTHL[:, j])
    return (read_BTHL / sum_BTH[..., None]).to(q_BTHC.dtype)


def routed_experts(
    x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up_EXD: Tensor, down_EDI: Tensor, tiles: RowTiles
) -> Tensor:
    """Σ weight · expert(x) over each token's experts, best first: (N, D)."""
    if x_ND.shape[0] == 1:  # a single sequence's next token, without the sorting
        y_KD = torch.cat([swiglu_layer(x_ND, gate_up_EXD[e], down_EDI[e], tiles) for e in indices_NK[0].tolist()])
        return weighted_sum(y_KD[None], weights_NK)
    order_M = indices_NK.flatten().argsort(stable=True)
    rows_MD = x_ND[order_M // indices_NK.shape[1]]
    counts_E = indices_NK.flatten().bincount(minlength=gate_up_EXD.shape[0])
    y_MD = torch.empty_like(rows_MD)
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            y_MD[start : start + count] = swiglu_layer(
                rows_MD[start : start + count], gate_up_EXD[expert], down_EDI[expert], tiles
            )
            start += count
    place_M = torch.empty_like(order_M)
    place_M[order_M] = torch.arange(order_M.numel(), device=order_M.device)
    return weighted_sum(y_MD[place_M].unflatten(0, indices_NK.shape), weights_NK)


def weighted_sum(y_NKD: Tensor, weights_NK: Tensor) -> Tensor:
    weighted_NKD = y_NKD * weights_NK.to(y_NKD.dtype)[..., None]
    sum_ND = weighted_NKD[:, 0]
    for k in range(1, weights_NK.shape[1]):
        sum_ND = sum_ND + weighted_NKD[:, k]
    return sum_ND


def swiglu_layer(x: Tensor, gate_up_XD: Tensor, down_DI: Tensor, tiles: RowTiles) -> Tensor:
    """One feed-forward, D → 2I → D."""
    return tiles.linear(exact_swiglu(tiles.linear(x, gate_up_XD)), down_DI)
